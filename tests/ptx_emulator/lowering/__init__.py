"""Instructions as written to instructions of the machine, by family."""

from . import arithmetic, communication, memory, moves, tensor
from .table import Instruction, lower

__all__ = ["Instruction", "arithmetic", "communication", "lower", "memory", "moves", "tensor"]
