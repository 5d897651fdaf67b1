"""PTX text of a kernel to a program of the machine; refuses whatever the machine does not execute exactly."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from . import lowering
from .modifiers import Modifiers
from .operands import Operands, Register
from .syntax import Parameter, RefusedError, Statement, entry, shared_variable, split_operands

LARGEST_GRANULE = 16


@dataclass
class ParsedKernel:
    name: str
    parameters: list[Parameter]
    max_threads: int | None
    exact_threads: bool
    program: object  # of the machine
    opcodes: list[str]  # of each instruction, as written
    dynamic_shared_start: int


@dataclass
class _Lowered:
    instruction: lowering.Instruction
    guard: Register | None
    negated: bool
    label: str | None
    opcode: str
    line: int


def parse(ptx: str, name: str | None, machine: ModuleType) -> ParsedKernel:
    kernel = entry(ptx, name)
    offsets = {parameter.name: parameter.offset for parameter in kernel.parameters}
    operands = Operands(machine.SPECIAL_REGISTERS, offsets)
    for variable in kernel.module_shared:
        operands.add_shared(variable)
    # Before the instructions: the dynamic shared memory lies behind all static variables.
    instructions = [s for s in kernel.statements if not _declare_shared(operands, s)]
    lowered: list[_Lowered] = []
    labels: dict[str, int] = {}
    for statement in instructions:
        try:
            _statement(statement, operands, labels, lowered)
        except RefusedError as refusal:
            raise RefusedError(f"{refusal.detail}: {statement.text}", statement.line) from None
    last_line = kernel.statements[-1].line if kernel.statements else 0
    lowered.append(_Lowered(lowering.Instruction("exit"), None, False, None, "ret", last_line))
    return ParsedKernel(
        kernel.name,
        kernel.parameters,
        kernel.max_threads,
        kernel.exact_threads,
        _program(lowered, labels, operands, machine),
        [item.opcode for item in lowered],
        operands.dynamic_shared_start,
    )


def _declare_shared(operands: Operands, statement: Statement) -> bool:
    if not statement.text.startswith(".shared"):
        return False
    variable = shared_variable(statement.text)
    if variable is None:
        raise RefusedError(f"shared variable: {statement.text}", statement.line)
    operands.add_shared(variable)
    return True


def _statement(statement: Statement, operands: Operands, labels: dict[str, int], lowered: list[_Lowered]) -> None:
    text = statement.text
    if text == "{":
        operands.open_scope()
    elif text == "}":
        operands.close_scope()
    elif text.endswith(":"):
        labels[text[:-1].strip()] = len(lowered)
    elif text.startswith("."):
        _directive(text, operands)
    else:
        lowered.append(_instruction(statement, operands))


def _directive(text: str, operands: Operands) -> None:
    if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text):
        operands.declare(match.group(1), match.group(2))
    elif text.startswith(".local"):
        raise RefusedError("local memory (spills, or an array that is indexed at run time) is not emulated")
    elif not text.startswith(".pragma"):
        raise RefusedError("directive not emulated")


def _instruction(statement: Statement, operands: Operands) -> _Lowered:
    match = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", statement.text)
    if match is None:
        raise RefusedError("not an instruction")
    negation, guard, opcode, dotted, rest = match.groups()
    modifiers = Modifiers([part for part in dotted.split(".") if part])
    instruction = lowering.lower(opcode, modifiers, split_operands(rest), operands)
    modifiers.finish()
    return _Lowered(
        instruction,
        operands.register(guard) if guard else None,
        bool(negation),
        rest.strip() if instruction.is_branch else None,
        opcode + dotted,
        statement.line,
    )


def _program(lowered: Sequence[_Lowered], labels: dict[str, int], operands: Operands, machine: ModuleType) -> object:
    program = machine.Program()
    place = operands.placed
    for item in lowered:
        if item.label is not None and item.label not in labels:
            raise RefusedError(f"no label {item.label}", item.line)
        try:
            program.add_instruction(
                item.instruction.name,
                [place(register) for register in item.instruction.destinations],
                [place(register) for register in item.instruction.sources],
                item.instruction.immediates,
                None if item.guard is None else place(item.guard)[0],
                item.negated,
                labels[item.label] if item.label is not None else -1,
                item.line,
            )
        except ValueError as error:
            raise RefusedError(f"{error} ({item.opcode})", item.line) from None
    for register, value in operands.constants():
        program.add_constant(*place(register), value)
    program.special = [
        place(operands.special[name])[0] if name in operands.special else -1 for name in machine.SPECIAL_REGISTERS
    ]
    program.constant_bytes = operands.constant_bytes
    program.register_bytes = operands.total_bytes
    program.static_shared_bytes = operands.dynamic_shared_start
    program.shared_granule = _granule(lowered, "shared")
    program.global_granule = _granule(lowered, "global")
    return program


def _granule(lowered: Sequence[_Lowered], space: str) -> int:
    """The smallest access of a space in bytes: what its shadow need not tell apart."""
    sizes = [size for item in lowered for spaces, size in item.instruction.accesses if space in spaces]
    return min([LARGEST_GRANULE, *sizes])
