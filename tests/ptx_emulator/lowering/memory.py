"""Loads, stores, atomics and asynchronous copies."""

from ..modifiers import Modifiers
from ..operands import Operands
from ..syntax import TYPE_BYTES, RefusedError
from .table import Instruction, lowers, need

ELEMENTS = {None: 1, "v2": 2, "v4": 4}
CACHE_HINTS = ("ca", "cg", "cs", "lu", "wb", "wt", "nc")


def _space(modifiers: Modifiers) -> str | None:
    """None: generic."""
    if modifiers.take("shared::cta"):
        return "shared"
    if modifiers.take("local"):
        raise RefusedError("local memory is not emulated")
    if modifiers.take("const"):
        raise RefusedError("constant memory is not emulated")
    if modifiers.take("shared::cluster"):
        raise RefusedError("clusters are not emulated")
    return modifiers.one_of("global", "shared", "param")


def _spaces(space: str | None) -> tuple[str, ...]:
    return ("global", "shared") if space is None else (space,)


def _integer_type(type_: str) -> str:
    """Memory holds bits; only extension in a wider register tells types apart."""
    if type_[0] == "s" and TYPE_BYTES[type_] < 8:
        return type_
    return f"u{8 * TYPE_BYTES[type_]}"


def _drop_policy(modifiers: Modifiers, arguments: list[str]) -> list[str]:
    """Without the cache policy that the hint adds as the last operand."""
    return arguments[:-1] if modifiers.take("L2::cache_hint") else arguments


@lowers("ld", "ldu", "st")
def _load_or_store(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    space = _space(modifiers)
    if modifiers.take("volatile") and space != "shared":
        raise RefusedError("volatile memory, which others may change meanwhile, is emulated only in shared memory")
    if modifiers.take("relaxed", "acquire", "release"):
        raise RefusedError("communication between running blocks is not emulated")
    modifiers.ignore("weak", *CACHE_HINTS)
    modifiers.ignore_prefixes("L1::")
    arguments = _drop_policy(modifiers, arguments)
    modifiers.ignore_prefixes("L2::")
    need(arguments, 2)
    elements = ELEMENTS[modifiers.one_of("v2", "v4")]
    type_ = modifiers.type()
    bytes_ = elements * TYPE_BYTES[type_]
    if bytes_ > 16:
        raise RefusedError("an access of more than 16 bytes")
    is_load = opcode != "st"
    address = operands.address(arguments[1 if is_load else 0])
    names = operands.vector(arguments[0 if is_load else 1])
    if len(names) != elements:
        raise RefusedError(f"{len(names)} registers for {elements} elements")
    base = "ld" if is_load else "st"
    name = ".".join([base, *([space] if space else []), _integer_type(type_)])
    if is_load:
        registers, sources = [operands.register(text) for text in names], [address.base]
    else:
        registers, sources = [], [address.base, *(operands.source_of_any_width(text, type_) for text in names)]
    return Instruction(name, registers, sources, [address.offset], [(_spaces(space), bytes_)])


@lowers("atom", "red")
def _atomic(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    space = _space(modifiers)
    if space == "param":
        raise RefusedError("an atomic on parameters")
    # Blocks run one after the other and lanes in order, so any ordering and scope holds.
    modifiers.ignore("relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys")
    operation = modifiers.require("add", "min", "max", "and", "or", "xor", "exch", "cas")
    type_ = modifiers.type()
    if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
        modifiers.ignore("noftz")
    returns = opcode == "atom"
    need(arguments, (3 if operation == "cas" else 2) + returns)
    address = operands.address(arguments[returns])
    values = [operands.source(text, type_) for text in arguments[1 + returns :]]
    kept = [operands.destination(arguments[0], type_)] if returns and arguments[0] != "_" else []
    name = ".".join(["atom", *([space] if space else []), operation, type_])
    accesses = [(_spaces(space), TYPE_BYTES[type_])]
    return Instruction(name, kept, [address.base, *values], [address.offset], accesses)


@lowers("cp")
def _copy(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    if not modifiers.take("async"):
        raise RefusedError("only cp.async is emulated")
    if modifiers.take("bulk"):
        raise RefusedError("bulk copies (TMA) are not emulated")
    if modifiers.take("mbarrier"):
        raise RefusedError("mbarriers are not emulated")
    if modifiers.take("commit_group"):
        return Instruction("cp.async.commit_group")
    if modifiers.take("wait_all"):
        return Instruction("cp.async.wait_all")
    if modifiers.take("wait_group"):
        return Instruction("cp.async.wait_group", immediates=[int(arguments[0], 0)])
    modifiers.require("ca", "cg")
    if not modifiers.take("shared", "shared::cta") or not modifiers.take("global"):
        raise RefusedError("a copy that does not go from global to shared memory")
    arguments = _drop_policy(modifiers, arguments)
    modifiers.ignore_prefixes("L2::")
    need(arguments, 3, 4)
    shared, source = operands.address(arguments[0]), operands.address(arguments[1])
    bytes_ = int(arguments[2], 0)
    if bytes_ not in (4, 8, 16):
        raise RefusedError(f"a copy of {bytes_} bytes")
    # The fourth operand is a number of bytes; as a predicate it would mean something else.
    read = [operands.source(text, "u32") for text in arguments[3:]]
    if any(text.startswith(("%p", "!")) for text in arguments[3:]):
        raise RefusedError("a predicate that ignores the source")
    return Instruction(
        "cp.async",
        sources=[shared.base, source.base, *read],
        immediates=[shared.offset, source.offset, bytes_],
        accesses=[(("global", "shared"), bytes_)],
    )
