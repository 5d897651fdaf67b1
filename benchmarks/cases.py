"""The benchmark cases as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One attention problem: float32, causal, shared QK where the provider has it."""

    length: int
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    chunk_length: int = 64
    n_hashes: int = 4

    def __str__(self) -> str:
        return (
            f"L {self.length} B {self.batch} H {self.heads} D {self.head_dim} C {self.chunk_length} R {self.n_hashes}"
        )


SUITES = {
    "default": [Case(length) for length in (1024, 4096, 16384)],
    "enwik8": [Case(8192, heads=2, head_dim=128, chunk_length=256)],
    "small": [Case(length, heads=2, head_dim=16) for length in (128, 512)],
}
