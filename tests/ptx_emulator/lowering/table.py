"""The table of lowerings, one per opcode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..modifiers import Modifiers
from ..operands import Operands, Register
from ..syntax import RefusedError


@dataclass
class Instruction:
    name: str  # canonical, as in the machine's registry
    destinations: Sequence[Register] = ()
    sources: Sequence[Register] = ()
    immediates: Sequence[int] = ()
    accesses: Sequence[tuple[tuple[str, ...], int]] = field(default_factory=tuple)  # spaces that it may be in, bytes
    is_branch: bool = False


Lowering = Callable[[str, Modifiers, list[str], Operands], Instruction]

_TABLE: dict[str, Lowering] = {}

REASONS = {
    "call": "calls are not emulated: inline the function",
    "brx": "jump tables are not emulated",
    "mbarrier": "mbarriers are not emulated",
    "griddepcontrol": "dependent launches are not emulated",
    "tcgen05": "tensor memory is not emulated",
    "setmaxnreg": "register reallocation is not emulated",
    "clusterlaunchcontrol": "clusters are not emulated",
    "mapa": "clusters are not emulated",
}


def lowers(*opcodes: str) -> Callable[[Lowering], Lowering]:
    def add(function: Lowering) -> Lowering:
        for opcode in opcodes:
            if opcode in _TABLE:
                raise ValueError(f"{opcode} is lowered twice")
            _TABLE[opcode] = function
        return function

    return add


def lower(opcode: str, modifiers: Modifiers, arguments: list[str], operands: Operands) -> Instruction:
    if opcode not in _TABLE:
        raise RefusedError(REASONS.get(opcode, f"unknown instruction {opcode}"))
    return _TABLE[opcode](opcode, modifiers, arguments, operands)


def need(arguments: Sequence[str], *counts: int) -> None:
    if len(arguments) not in counts:
        raise RefusedError(f"{len(arguments)} operands where {' or '.join(map(str, counts))} are known")
