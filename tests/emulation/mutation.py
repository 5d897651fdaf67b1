"""A mistake that is made on purpose: a text of a kernel's source, and what it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    file: str
    name: str
    problem: str  # that must show it
    shown_as: str  # the kind of an EmulationError, or "wrong"; empty: any
    text: str
    becomes: str

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    def apply(self, folder: Path) -> None:
        """To the sources in a folder."""
        path = folder / self.file
        source = path.read_text()
        assert source.count(self.text) == 1, "the text to replace is not there once"
        path.write_text(source.replace(self.text, self.becomes))
