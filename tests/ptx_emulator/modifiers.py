"""The dotted parts of an instruction's name, each taken by who understands it: what is left over is refused."""

from .syntax import TYPE_BYTES, RefusedError


class Modifiers:
    def __init__(self, parts: list[str]):
        self._parts = list(parts)

    def take(self, *names: str) -> bool:
        """Whether one of the names is there; it counts as understood."""
        return self.one_of(*names) is not None

    def one_of(self, *names: str) -> str | None:
        for part in self._parts:
            if part in names:
                self._parts.remove(part)
                return part
        return None

    def require(self, *names: str) -> str:
        found = self.one_of(*names)
        if found is None:
            raise RefusedError(f"needs one of .{', .'.join(names)}")
        return found

    def ignore(self, *names: str) -> None:
        """Modifiers that cannot change a result here."""
        self._parts = [part for part in self._parts if part not in names]

    def ignore_prefixes(self, *prefixes: str) -> None:
        self._parts = [part for part in self._parts if not part.startswith(prefixes)]

    def type(self) -> str:
        """The last type."""
        for part in reversed(self._parts):
            if part in TYPE_BYTES:
                index = len(self._parts) - 1 - self._parts[::-1].index(part)
                del self._parts[index]
                return part
        raise RefusedError("has no type")

    def finish(self) -> None:
        if self._parts:
            raise RefusedError(f"modifiers not emulated: .{'.'.join(self._parts)}")
