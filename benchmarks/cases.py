"""The benchmark cases and suites as data."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """One attention problem: float32, shared QK where the provider has it; causal, but for the target "module"."""

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

    def shorter(self, length: int) -> "Case":
        """The same problem of at most that length."""
        return replace(self, length=min(self.length, length))

    def one_head(self) -> "Case":
        return replace(self, batch=1, heads=1)


PEERS = ("ours", "torch SDPA", "Hugging Face", "lucidrains", "projections alone")


@dataclass(frozen=True)
class Suite:
    """What one run measures. A new suite is one entry of SUITES, a new competitor one entry of providers.PROVIDERS."""

    cases: tuple[Case, ...] = ()
    targets: tuple[str, ...] = ("attention", "layer")
    providers: tuple[str, ...] = PEERS
    memory: tuple[Case, ...] = ()  # each provider in a fresh process
    kernels: str | None = (
        None  # which of kernel_cases.VARIANTS; then hashing, sorting and small calls are measured, too
    )


_LENGTHS = (1024, 4096, 16384, 65536)
SUITES: dict[str, Suite] = {
    "default": Suite(cases=tuple(Case(length) for length in _LENGTHS), memory=(Case(16384),)),
    "quick": Suite(cases=tuple(Case(length) for length in _LENGTHS[:2]), memory=(Case(4096),)),
    "enwik8": Suite(cases=(Case(8192, heads=2, head_dim=128, chunk_length=256),)),
    "memory": Suite(memory=(Case(16384),)),
    "long": Suite(
        cases=(Case(16384), Case(65536)),
        targets=("attention",),
        providers=("ours",),
        memory=(Case(2**20, heads=2),),
    ),
    "backends": Suite(
        cases=(Case(1024), Case(4096)), targets=("attention",), providers=("ours", "ours, cpu", "ours, reference")
    ),
    "drop-in": Suite(
        cases=tuple(Case(length) for length in (32, 128, 1024, 4096, 16384)),
        targets=("module",),
        providers=("ours", "nn.MultiheadAttention"),
        memory=(Case(16384),),
    ),
    "kernels": Suite(kernels="default"),
    "small": Suite(
        cases=tuple(Case(length, heads=2, head_dim=16) for length in (128, 512)),
        memory=(Case(512, heads=2, head_dim=16),),
    ),
    "small drop-in": Suite(
        cases=tuple(Case(length, heads=2, head_dim=16) for length in (128, 300)),
        targets=("module",),
        providers=("ours", "nn.MultiheadAttention"),
    ),
    "tiny": Suite(  # whether the command works, in a few seconds
        cases=(Case(128, heads=2, head_dim=16),),
        targets=("attention",),
        memory=(Case(128, heads=2, head_dim=16),),
        kernels="small",
    ),
}
