"""Registers, constants and symbols of one kernel: the text of an operand to its place in the register file."""

import re
import struct
from typing import NamedTuple

from .syntax import TYPE_BYTES, RefusedError, SharedVariable

LANES = 32
DYNAMIC_SHARED_ALIGNMENT = 128


class Register(NamedTuple):
    offset: int  # in the register file of a warp, in bytes
    wide: bool  # 8 bytes a lane, else 4


class Address(NamedTuple):
    base: Register
    offset: int


class Operands:
    def __init__(self, special_registers: list[str], parameter_offsets: dict[str, int]):
        # The file begins with the constants, but their number shows only at the end: two counters until then.
        self._constants: dict[tuple[int, bool], int] = {}
        self.constant_bytes = 0
        self._register_bytes = 0
        self._special_names = special_registers
        self.special: dict[str, Register] = {}
        self._scopes: list[dict[str, Register]] = [{}]
        self._parameter_offsets = parameter_offsets
        self._shared: dict[str, int] = {}
        self.static_shared_bytes = 0
        self._dynamic_shared: set[str] = set()

    # Constants take negative offsets until `placed` moves everything.
    def placed(self, register: Register) -> tuple[int, bool]:
        return register.offset + self.constant_bytes, register.wide

    @property
    def total_bytes(self) -> int:
        return self.constant_bytes + self._register_bytes

    def constants(self) -> list[tuple[Register, int]]:
        return [(Register(offset, wide), value) for (value, wide), offset in self._constants.items()]

    def open_scope(self) -> None:
        self._scopes.append({})

    def close_scope(self) -> None:
        self._scopes.pop()

    def declare(self, type_: str, names: str) -> None:
        """`names` as in `.reg .b32 %r<4>, %x`."""
        if type_ not in TYPE_BYTES:
            raise RefusedError(f"registers of type .{type_}")
        wide = TYPE_BYTES[type_] == 8
        for name in (part.strip() for part in names.split(",")):
            family = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            members = [f"{family.group(1)}{i}" for i in range(int(family.group(2)))] if family else [name]
            for member in members:
                self._scopes[-1][member] = self._allocate(wide)

    def add_shared(self, variable: SharedVariable) -> None:
        if variable.size is None:
            self._dynamic_shared.add(variable.name)
            return
        start = -(-self.static_shared_bytes // variable.alignment) * variable.alignment
        self._shared[variable.name] = start
        self.static_shared_bytes = start + variable.size

    @property
    def dynamic_shared_start(self) -> int:
        return -(-self.static_shared_bytes // DYNAMIC_SHARED_ALIGNMENT) * DYNAMIC_SHARED_ALIGNMENT

    def register(self, text: str) -> Register:
        text = text.strip()
        if text == "_":  # written, never read
            return self._scopes[0].setdefault("_", self._allocate(True))
        found = self._lookup(text)
        if found is None:
            raise RefusedError(f"no such register: {text}")
        return found

    def source(self, text: str, type_: str) -> Register:
        """A register or a constant, as wide as the type."""
        found = self.source_of_any_width(text, type_)
        wide = TYPE_BYTES[type_] == 8
        if found.wide != wide:
            raise RefusedError(f"{text} is not as wide as .{type_}")
        return found

    def source_of_any_width(self, text: str, type_: str) -> Register:
        text = text.strip()
        found = self._lookup(text)
        if found is not None:
            return found
        value = self._value(text, type_)
        return self.constant(int(value != 0) if type_ == "pred" else value, TYPE_BYTES[type_] == 8)

    def destination(self, text: str, type_: str) -> Register:
        found = self.register(text)
        if text != "_" and found.wide != (TYPE_BYTES[type_] == 8):
            raise RefusedError(f"{text} is not as wide as .{type_}")
        return found

    def vector(self, text: str) -> list[str]:
        """The elements of `{a, b}`, or the single operand."""
        text = text.strip()
        return [part.strip() for part in text[1:-1].split(",")] if text.startswith("{") else [text]

    def address(self, text: str) -> Address:
        """`[register + offset]`, `[symbol + offset]` or `[number]`."""
        match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text.strip())
        if match is None:
            raise RefusedError(f"address {text}")
        base, sign, offset_text = match.groups()
        offset = int(offset_text, 0) if offset_text else 0
        if sign == "-":
            offset = -offset
        found = self._lookup(base)
        if found is not None:
            return Address(found, offset)
        return Address(self.constant(0, True), offset + self._value(base, "u64"))

    def constant(self, value: int, wide: bool) -> Register:
        value &= (1 << 64) - 1 if wide else (1 << 32) - 1
        key = (value, wide)
        if key not in self._constants:
            self.constant_bytes += LANES * (8 if wide else 4)
            self._constants[key] = -self.constant_bytes
        return Register(self._constants[key], wide)

    def _allocate(self, wide: bool) -> Register:
        offset = self._register_bytes
        self._register_bytes += LANES * (8 if wide else 4)
        return Register(offset, wide)

    def _lookup(self, text: str) -> Register | None:
        for scope in reversed(self._scopes):
            if text in scope:
                return scope[text]
        if text.startswith("%") and text[1:] in self._special_names:
            if text[1:] not in self.special:
                self.special[text[1:]] = self._allocate(False)
            return self.special[text[1:]]
        return None

    def _value(self, text: str, type_: str) -> int:
        """The bits of a literal, or the address of a symbol in its space."""
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            return int(match.group(1), 16)
        if match := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", text):
            return int(match.group(1), 16)
        if match := re.fullmatch(r"(-?)(0[xX][0-9A-Fa-f]+|0[bB][01]+|\d+)U?", text):
            sign, digits = match.groups()
            octal = re.fullmatch(r"0\d+", digits)
            value = int(digits, 8 if octal else 0)
            return -value if sign else value
        if re.fullmatch(r"-?\d+\.\d*(?:[eE][-+]?\d+)?", text):
            if type_ == "f64":
                return int.from_bytes(struct.pack("<d", float(text)), "little")
            return int.from_bytes(struct.pack("<f", float(text)), "little")
        if text == "WARP_SZ":
            return LANES
        if text in self._shared:
            return self._shared[text]
        if text in self._dynamic_shared:
            return self.dynamic_shared_start
        if text in self._parameter_offsets:
            return self._parameter_offsets[text]
        if text.startswith("%"):
            raise RefusedError(f"no such register: {text}")
        raise RefusedError(f"unknown symbol: {text}")
