"""Moves, packing, conversions of addresses, branches, and what does nothing here."""

from ..modifiers import Modifiers
from ..operands import Operands
from ..syntax import TYPE_BYTES, RefusedError
from .table import Instruction, lowers, need


@lowers("mov")
def _move(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 2)
    type_ = modifiers.type()
    target, source = arguments
    bits = 8 * TYPE_BYTES[type_]
    if target.startswith("{"):
        names = operands.vector(target)
        return Instruction(
            "unpack",
            [operands.register(name) for name in names],
            [operands.source(source, type_)],
            [bits // len(names)],
        )
    if source.startswith("{"):
        parts = operands.vector(source)
        part_type = f"b{bits // len(parts)}"
        return Instruction(
            "pack",
            [operands.destination(target, type_)],
            [operands.source_of_any_width(part, part_type) for part in parts],
            [bits // len(parts)],
        )
    # A special register is narrow even where the type is not, as in mov.u64 %rd1, %tid.x.
    return Instruction("mov", [operands.destination(target, type_)], [operands.source_of_any_width(source, type_)])


@lowers("cvta")
def _convert_address(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 2)
    type_ = modifiers.type()
    name = "cvta.to." if modifiers.take("to") else "cvta."
    modifiers.ignore("shared::cta") if modifiers.take("shared::cta") else None
    space = modifiers.require("global", "shared", "param")
    return Instruction(
        name + space, [operands.destination(arguments[0], type_)], [operands.source(arguments[1], type_)]
    )


@lowers("bra")
def _branch(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 1)
    modifiers.ignore("uni")
    return Instruction("bra", is_branch=True)


@lowers("ret", "exit")
def _exit(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    modifiers.ignore("uni")
    return Instruction("exit")


@lowers("trap")
def _trap(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    return Instruction("trap")


@lowers("activemask")
def _active_mask(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    modifiers.ignore("b32")
    return Instruction("activemask", [operands.destination(arguments[0], "b32")])


@lowers("membar", "fence")
def _fence(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    """Memory is sequentially consistent here."""
    modifiers.ignore("cta", "gpu", "gl", "sys", "acq_rel", "sc", "acquire", "release", "relaxed")
    if modifiers.take("proxy"):
        modifiers.ignore("async", "async::generic", "shared::cta", "async.shared::cta")
    return Instruction("nop")


@lowers("nanosleep", "createpolicy", "prefetch")
def _no_effect(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    """Waiting, and hints for caches. The register of a policy is read only by other hints."""
    if opcode == "nanosleep":
        modifiers.ignore("u32")
    elif opcode == "prefetch":
        modifiers.ignore("global", "L1", "L2")
    else:
        modifiers.ignore("fractional", "b64")
        modifiers.ignore_prefixes("L2::")
    return Instruction("nop")


@lowers("pmevent", "brkpt")
def _debugger(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    raise RefusedError("debugging instructions are not emulated")
