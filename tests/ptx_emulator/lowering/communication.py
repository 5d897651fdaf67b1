"""Barriers and exchanges between the lanes of a warp."""

from ..modifiers import Modifiers
from ..operands import Operands
from ..syntax import RefusedError
from .table import Instruction, lowers, need


@lowers("bar", "barrier")
def _barrier(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    if modifiers.take("warp"):
        modifiers.require("sync")
        need(arguments, 1)
        return Instruction("bar.warp.sync", sources=[operands.source(arguments[0], "b32")])
    if modifiers.take("cluster"):
        raise RefusedError("clusters are not emulated")
    modifiers.ignore("cta")
    waits = modifiers.require("sync", "arrive") == "sync"
    aligned = modifiers.take("aligned") or opcode == "bar"
    need(arguments, 1, 2)
    return Instruction(
        "bar.sync", sources=[operands.source(text, "u32") for text in arguments], immediates=[int(aligned), int(waits)]
    )


@lowers("shfl")
def _shuffle(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    modifiers.require("sync")
    mode = modifiers.require("up", "down", "bfly", "idx")
    modifiers.require("b32")
    need(arguments, 5)
    value, *inside = arguments[0].split("|")
    return Instruction(
        f"shfl.{mode}",
        [operands.destination(value, "b32"), *map(operands.register, inside)],
        [operands.source(text, "b32") for text in arguments[1:]],
    )


@lowers("vote")
def _vote(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    modifiers.require("sync")
    kind = modifiers.require("ballot", "any", "all", "uni")
    modifiers.require("b32" if kind == "ballot" else "pred")
    need(arguments, 3)
    return Instruction(
        f"vote.{kind}",
        [operands.register(arguments[0])],
        [operands.source(arguments[1].lstrip("!"), "pred"), operands.source(arguments[2], "b32")],
        [int(arguments[1].startswith("!"))],
    )


@lowers("match")
def _match(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    kind = modifiers.require("any", "all")
    modifiers.require("sync")
    type_ = modifiers.type()
    need(arguments, 3)
    return Instruction(
        f"match.{kind}.{type_}",
        [operands.register(text) for text in arguments[0].split("|")],
        [operands.source(arguments[1], type_), operands.source(arguments[2], "b32")],
    )


@lowers("redux")
def _reduce(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    modifiers.require("sync")
    operation = modifiers.require("add", "min", "max", "and", "or", "xor")
    type_ = modifiers.type()
    need(arguments, 3)
    return Instruction(
        f"redux.{operation}.{type_}",
        [operands.destination(arguments[0], type_)],
        [operands.source(arguments[1], type_), operands.source(arguments[2], "b32")],
    )


@lowers("elect")
def _elect(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    modifiers.require("sync")
    need(arguments, 2)
    return Instruction(
        "elect",
        [operands.register(text) for text in arguments[0].split("|")],
        [operands.source(arguments[1], "b32")],
    )
