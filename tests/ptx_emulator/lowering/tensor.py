"""Matrices: ldmatrix, stmatrix, mma.sync, wgmma."""

import re

from ..modifiers import Modifiers
from ..operands import Operands
from ..syntax import RefusedError
from .table import Instruction, lowers, need

MATRICES = {"x1": 1, "x2": 2, "x4": 4}
MATRIX_ROW_BYTES = 16


@lowers("ldmatrix", "stmatrix")
def _move_matrices(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    for part in ("sync", "aligned", "m8n8", "b16"):
        modifiers.require(part)
    modifiers.require("shared", "shared::cta")
    count = MATRICES[modifiers.require(*MATRICES)]
    name = opcode + (".trans" if modifiers.take("trans") else "")
    need(arguments, 2)
    is_load = opcode == "ldmatrix"
    address = operands.address(arguments[1 if is_load else 0])
    names = operands.vector(arguments[0 if is_load else 1])
    if len(names) != count:
        raise RefusedError(f"{len(names)} registers for {count} matrices")
    accesses = [(("shared",), MATRIX_ROW_BYTES)]
    if is_load:
        registers = [operands.destination(text, "b32") for text in names]
        return Instruction(name, registers, [address.base], [address.offset], accesses)
    return Instruction(
        name, [], [address.base, *(operands.source(text, "b32") for text in names)], [address.offset], accesses
    )


def _operand_type(modifiers: Modifiers, shape: str) -> str:
    """Of a and b; c and d are float32."""
    types = [modifiers.type() for _ in range(2)]
    if types[0] != types[1]:
        raise RefusedError(f"{shape} of different types")
    return types[0]


@lowers("mma")
def _multiply(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    for part in ("sync", "aligned", "row", "col"):
        modifiers.require(part)
    shape = modifiers.require("m16n8k4", "m16n8k8", "m16n8k16")
    if modifiers.type() != "f32":
        raise RefusedError("mma with sums in other than float32")
    type_ = _operand_type(modifiers, "mma")
    if modifiers.type() != "f32":
        raise RefusedError("mma with results in other than float32")
    need(arguments, 4)
    vectors = [operands.vector(text) for text in arguments]
    k = int(shape.rpartition("k")[2])
    elements_per_register = 1 if type_ == "tf32" else 2
    expected = [4, 16 * k // 32 // elements_per_register, 8 * k // 32 // elements_per_register, 4]
    if [len(vector) for vector in vectors] != expected:
        raise RefusedError(f"mma operands of {[len(v) for v in vectors]} registers where {expected} are known")
    return Instruction(
        f"mma.{shape}.{type_}",
        [operands.destination(text, "b32") for text in vectors[0]],
        [operands.source(text, "b32") for vector in vectors[1:] for text in vector],
    )


@lowers("wgmma")
def _warpgroup_multiply(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    """Executed when issued, so that fences, commits and waits do nothing: a missing one goes unseen."""
    kind = modifiers.require("mma_async", "fence", "commit_group", "wait_group")
    modifiers.require("sync")
    modifiers.require("aligned")
    if kind != "mma_async":
        return Instruction("nop.whole_warp")
    shape = modifiers.require(*(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16)))
    columns, depth = map(int, re.findall(r"n(\d+)k(\d+)", shape)[0])
    type_ = _operand_type(modifiers, "wgmma")
    if modifiers.type() != "f32":
        raise RefusedError("wgmma with results in other than float32")
    if depth != (8 if type_ == "tf32" else 16):
        raise RefusedError(f"wgmma {shape} of {type_}")
    result = operands.vector(arguments[0])
    if len(result) != columns // 2:
        raise RefusedError(f"{len(result)} result registers for {columns} columns")
    a = operands.vector(arguments[1])
    a_in_registers = arguments[1].startswith("{")
    scale, *flags = arguments[3:]
    if flags[:2] != ["1", "1"]:
        raise RefusedError("wgmma with negated operands")
    transposed = [int(flag, 0) for flag in flags[2:]]
    expected_flags = 0 if type_ == "tf32" else 1 if a_in_registers else 2
    if len(transposed) not in (0, expected_flags):
        raise RefusedError("wgmma with unknown operands")
    transposed_b = transposed[-1] if transposed else 0
    transposed_a = transposed[0] if transposed and not a_in_registers else 0
    registers = [operands.destination(text, "b32") for text in result]
    a_sources = [operands.source(text, "b32" if a_in_registers else "b64") for text in a]
    return Instruction(
        f"wgmma.{type_}",
        registers,
        [*a_sources, operands.source(arguments[2], "b64"), operands.source(scale, "pred"), *registers],
        [columns, int(a_in_registers), transposed_a, transposed_b],
    )
