"""Integer, float and bit arithmetic, comparisons and conversions."""

from ..modifiers import Modifiers
from ..operands import Operands
from ..syntax import TYPE_BYTES, RefusedError
from .table import Instruction, lowers, need

FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")
ROUNDINGS = ("rn", "rz", "rm", "rp")


def _same_type(name: str, type_: str, arguments: list[str], operands: Operands) -> Instruction:
    return Instruction(
        f"{name}.{type_}",
        [operands.destination(arguments[0], type_)],
        [operands.source(text, type_) for text in arguments[1:]],
    )


def _float_name(opcode: str, modifiers: Modifiers) -> str:
    """With the modifiers that change a result; rounding to nearest is the default."""
    rounding = modifiers.one_of(*ROUNDINGS)
    parts = [opcode]
    if rounding not in (None, "rn"):
        parts.append(rounding)
    parts += [name for name in ("sat", "NaN", "ftz") if modifiers.take(name)]
    return ".".join(parts)


@lowers("add", "sub", "min", "max", "div")
def _binary(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 3)
    type_ = modifiers.type()
    if type_ == "s32" and opcode in ("min", "max") and modifiers.take("relu"):
        opcode += ".relu"
    if type_ not in FLOATS:
        return _same_type(opcode, type_, arguments, operands)
    if opcode == "div":
        modifiers.ignore("full", "approx")
    return _same_type(_float_name(opcode, modifiers), type_, arguments, operands)


@lowers("rem")
def _remainder(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 3)
    return _same_type(opcode, modifiers.type(), arguments, operands)


@lowers("mul", "mad")
def _multiply(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 3 if opcode == "mul" else 4)
    type_ = modifiers.type()
    if type_ in FLOATS:
        return _same_type(_float_name("fma" if opcode == "mad" else "mul", modifiers), type_, arguments, operands)
    part = modifiers.require("lo", "hi", "wide")
    if part != "wide":
        return _same_type(f"{opcode}.{part}", type_, arguments, operands)
    wide = f"{type_[0]}{2 * int(type_[1:])}"
    sources = [operands.source(text, type_) for text in arguments[1:3]]
    sources += [operands.source(text, wide) for text in arguments[3:]]
    return Instruction(f"{opcode}.wide.{type_}", [operands.destination(arguments[0], wide)], sources)


@lowers("fma")
def _fused(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 4)
    type_ = modifiers.type()
    return _same_type(_float_name(opcode, modifiers), type_, arguments, operands)


@lowers("neg", "abs")
def _sign(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 2)
    type_ = modifiers.type()
    name = _float_name(opcode, modifiers) if type_ in FLOATS else opcode
    return _same_type(name, type_, arguments, operands)


@lowers("rcp", "sqrt", "rsqrt", "ex2", "lg2", "tanh", "sin", "cos")
def _function(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 2)
    type_ = modifiers.type()
    modifiers.ignore("approx")  # the exact result, rounded, is among the approximations allowed
    return _same_type(_float_name(opcode, modifiers), type_, arguments, operands)


@lowers("copysign")
def _copysign(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 3)
    return _same_type(opcode, modifiers.type(), arguments, operands)


@lowers("and", "or", "xor", "not")
def _logic(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 2 if opcode == "not" else 3)
    return _same_type(opcode, modifiers.type(), arguments, operands)


@lowers("shl", "shr")
def _shift(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 3)
    type_ = modifiers.type()
    canonical = type_.replace("b", "u") if opcode == "shr" else type_
    return Instruction(
        f"{opcode}.{canonical}",
        [operands.destination(arguments[0], type_)],
        [operands.source(arguments[1], type_), operands.source(arguments[2], "u32")],
    )


@lowers("shf")
def _funnel_shift(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 4)
    name = f"shf.{modifiers.require('l', 'r')}.{modifiers.require('wrap', 'clamp')}"
    return _same_type(name, modifiers.type(), arguments, operands)


@lowers("bfe", "bfi")
def _bit_field(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 4 if opcode == "bfe" else 5)
    type_ = modifiers.type()
    values, position = arguments[1:-2], arguments[-2:]
    sources = [operands.source(text, type_) for text in values] + [operands.source(text, "u32") for text in position]
    return Instruction(f"{opcode}.{type_}", [operands.destination(arguments[0], type_)], sources)


@lowers("popc", "clz", "bfind")
def _count_bits(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 2)
    type_ = modifiers.type()
    return Instruction(
        f"{opcode}.{type_}", [operands.destination(arguments[0], "u32")], [operands.source(arguments[1], type_)]
    )


@lowers("brev")
def _reverse(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 2)
    return _same_type(opcode, modifiers.type(), arguments, operands)


@lowers("prmt")
def _permute(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 4)
    return _same_type(opcode, modifiers.type(), arguments, operands)


@lowers("lop3")
def _logic_of_three(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 5)
    instruction = _same_type(opcode, modifiers.type(), arguments[:4], operands)
    instruction.immediates = [int(arguments[4], 0)]
    return instruction


@lowers("bmsk")
def _bit_mask(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 3)
    return _same_type(f"bmsk.{modifiers.require('clamp', 'wrap')}", modifiers.type(), arguments, operands)


COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs")
FLOAT_COMPARISONS = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")


@lowers("setp")
def _compare(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    comparison = modifiers.require(*COMPARISONS, *FLOAT_COMPARISONS)
    combination = modifiers.one_of("and", "or", "xor")
    type_ = modifiers.type()
    flush = "ftz." if modifiers.take("ftz") else ""
    need(arguments, 4 if combination else 3)
    sources = [operands.source(text, type_) for text in arguments[1:3]]
    negated = False
    if combination:
        negated = arguments[3].startswith("!")
        sources.append(operands.source(arguments[3].lstrip("!"), "pred"))
    return Instruction(
        f"setp.{comparison}.{flush}{type_}",
        [operands.register(text) for text in arguments[0].split("|")],
        sources,
        [(None, "and", "or", "xor").index(combination), int(negated)],
    )


@lowers("selp")
def _select(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    need(arguments, 4)
    type_ = modifiers.type()
    return Instruction(
        f"selp.b{8 * TYPE_BYTES[type_]}",
        [operands.destination(arguments[0], type_)],
        [*(operands.source(text, type_) for text in arguments[1:3]), operands.source(arguments[3], "pred")],
    )


@lowers("cvt")
def _convert(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    source_type, target_type = modifiers.type(), modifiers.type()
    rounding = modifiers.one_of(*ROUNDINGS, "rna", "rni", "rzi", "rmi", "rpi")
    flags = [name for name in ("sat", "relu", "ftz") if modifiers.take(name)]
    if "ftz" in flags and {source_type, target_type} & {"f16", "bf16"} and "f32" in (source_type, target_type):
        raise RefusedError("flushing in a conversion of half precision")
    name = ".".join(["cvt", *([rounding] if rounding else []), *flags, target_type, source_type])
    if target_type in ("f16x2", "bf16x2"):
        need(arguments, 3)
        return Instruction(
            name,
            [operands.destination(arguments[0], target_type)],
            [operands.source(text, source_type) for text in arguments[1:]],
        )
    need(arguments, 2)
    # Registers may be wider than the types.
    return Instruction(
        name, [operands.register(arguments[0])], [operands.source_of_any_width(arguments[1], source_type)]
    )
