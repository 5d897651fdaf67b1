"""Position embeddings: axial, learned, sinusoidal and rotary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_int, check_like, check_shape, check_tensor, is_readable

_INTEGERS = (torch.int64, torch.int32)


def check_positions(name: str, positions: Any) -> None:
    """An integer tensor of any shape."""
    if not isinstance(positions, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(positions).__name__}")
    check_tensor(name, positions, " ".join(["N"] * positions.dim()), _INTEGERS)


def check_row_positions(name: str, positions: Any, rows: Tensor) -> None:
    """Positions [L] or [B, L] of rows [B, ..., L, D]."""
    check_positions(name, positions)
    check_like(name, positions, "x", rows)
    batch, length = rows.shape[0], rows.shape[-2]
    if positions.shape not in ((length,), (batch, length)):
        raise ValueError(f"{name} must have shape [{length}] or [{batch}, {length}], got {list(positions.shape)}")


def check_base(name: str, base: Any) -> None:
    if isinstance(base, bool) or not isinstance(base, (int, float)):
        raise TypeError(f"{name} must be a float, got {base!r}")
    if not (base > 0 and math.isfinite(base)):
        raise ValueError(f"{name} must be positive and finite, got {base}")


def _check_init_std(init_std: Any) -> None:
    if isinstance(init_std, bool) or not isinstance(init_std, (int, float)):
        raise TypeError(f"init_std must be a float, got {init_std!r}")
    if not (init_std >= 0 and math.isfinite(init_std)):
        raise ValueError(f"init_std must be at least 0 and finite, got {init_std}")


def _check_sizes(name: str, sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, (tuple, list)) or not sizes:
        raise TypeError(f"{name} must be a sequence of positive ints, got {sizes!r}")
    for size in sizes:
        check_int(name, size, 1)
    return tuple(sizes)


def _check_range(positions: Tensor, max_length: int, table: Tensor) -> None:
    """Positions from 0 to ``max_length`` - 1. Values are read only where that costs nothing; lookups check them too."""
    check_positions("positions", positions)
    check_like("positions", positions, "the embedding's weights", table)
    if not is_readable(positions):
        return
    least, most = (int(bound) for bound in torch.aminmax(positions))
    if least < 0 or most >= max_length:
        raise IndexError(f"positions must be between 0 and {max_length - 1}, got {least} to {most}")


def _angles(positions: Tensor, n_angles: int, width: int, base: float, dtype: torch.dtype) -> Tensor:
    """``position * base ** (-2 i / width)`` less whole turns, [..., n_angles].

    In float64 until the whole turns are gone: a million radians are known to 0.03 in float32.
    """
    exponents = torch.arange(n_angles, dtype=torch.float64, device=positions.device) * (-2 / width)
    turns = positions[..., None].to(torch.float64) * ((exponents * math.log(base)).exp() / (2 * math.pi))
    return (turns.frac() * (2 * math.pi)).to(dtype)


class _Tables(nn.ParameterList):
    """Parameters with an initialisation of their own: FSDP asks each module for that of what it holds itself."""

    def __init__(self, tables: Iterable[nn.Parameter], init_std: float) -> None:
        super().__init__(tables)
        self.init_std = init_std

    def reset_parameters(self) -> None:
        """Normal values of the standard deviation ``init_std``."""
        for table in self:
            nn.init.normal_(table, std=self.init_std)


class AxialPositionEmbedding(nn.Module):
    """A sum or a concatenation of one small table per axis (arXiv 2001.04451, section 4; trax, Hugging Face).

    Position p has the row-major coordinates of an array of ``axial_shape``: (p // n1, p % n1) on two axes.

    Args:
        embed_dim: E, size of the embedding.
        axial_shape: the axes' lengths; their product is ``max_length``. Sequences may be shorter, in training too.
        axial_dims: the widths of the axes' vectors, which are concatenated (trax, Hugging Face); their sum is E. None:
            all have E and are added (lucidrains).
        init_std: standard deviation of the normal initialisation.
        device, dtype: of the parameters ``weights``, a table [n_i, d_i] for each axis.

    Shape: integer positions [...] -> [..., E], in the tables' dtype.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
        IndexError: a position is negative or not below ``max_length`` (on the CPU; on a GPU a device-side assertion).
    """

    def __init__(
        self,
        embed_dim: int,
        axial_shape: Sequence[int],
        axial_dims: Sequence[int] | None = None,
        *,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("embed_dim", embed_dim, 1)
        self.axial_shape = _check_sizes("axial_shape", axial_shape)
        self.axial_dims = None if axial_dims is None else _check_sizes("axial_dims", axial_dims)
        if self.axial_dims is not None and len(self.axial_dims) != len(self.axial_shape):
            raise ValueError(
                f"axial_dims must have one width for each of the {len(self.axial_shape)} axes, got {axial_dims}"
            )
        if self.axial_dims is not None and sum(self.axial_dims) != embed_dim:
            raise ValueError(f"axial_dims must sum to embed_dim, {embed_dim}, got {axial_dims}")
        _check_init_std(init_std)
        self.embed_dim, self.init_std = embed_dim, init_std
        self.max_length = math.prod(self.axial_shape)
        widths = self.axial_dims or (embed_dim,) * len(self.axial_shape)
        tables = (
            nn.Parameter(torch.empty(length, width, device=device, dtype=dtype))
            for length, width in zip(self.axial_shape, widths, strict=True)
        )
        self.weights = _Tables(tables, init_std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal values of the standard deviation ``init_std``, as the constructor gives."""
        self.weights.reset_parameters()

    def forward(self, positions: Tensor) -> Tensor:
        """Integer positions [...] -> [..., embed_dim]."""
        tables = list(self.weights)
        _check_range(positions, self.max_length, tables[0])
        parts = []
        stride = self.max_length
        for axis, (table, length) in enumerate(zip(tables, self.axial_shape, strict=True)):
            stride //= length
            coordinate = positions // stride
            if axis > 0:  # the first coordinate of a position past the end is past the end of its table
                coordinate = coordinate % length
            parts.append(F.embedding(coordinate, table))
        if self.axial_dims is not None:
            return torch.cat(parts, -1)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, axial_shape={self.axial_shape}, axial_dims={self.axial_dims}"


class LearnedPositionEmbedding(nn.Module):
    """A table with one vector for each position.

    Args:
        embed_dim: E, size of the embedding.
        max_length: number of positions.
        init_std: standard deviation of the normal initialisation.
        device, dtype: of the parameter ``weight``, [max_length, E].

    Shape: integer positions [...] -> [..., E], in the table's dtype.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
        IndexError: a position is negative or not below ``max_length`` (on the CPU; on a GPU a device-side assertion).
    """

    def __init__(
        self,
        embed_dim: int,
        max_length: int,
        *,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("embed_dim", embed_dim, 1)
        check_int("max_length", max_length, 1)
        _check_init_std(init_std)
        self.embed_dim, self.max_length, self.init_std = embed_dim, max_length, init_std
        self.weight = nn.Parameter(torch.empty(max_length, embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal values of the standard deviation ``init_std``, as the constructor gives."""
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, positions: Tensor) -> Tensor:
        """Integer positions [...] -> [..., embed_dim]."""
        _check_range(positions, self.max_length, self.weight)
        return F.embedding(positions, self.weight)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, max_length={self.max_length}"


class SinusoidalPositionEmbedding(nn.Module):
    """Sines and cosines of the position (Vaswani et al. 2017, arXiv 1706.03762, section 3.5). No parameters.

    With ``angle_i = position / 10000 ** (2 i / E)``, channel 2 i is ``sin(angle_i)`` and channel 2 i + 1 is
    ``cos(angle_i)``: they alternate. An odd E ends with a sine.

    Args:
        embed_dim: E, size of the embedding.

    Shape: integer positions [...] -> float32 [..., E]. There is no largest position: ``max_length`` is None.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """

    max_length = None

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        check_int("embed_dim", embed_dim, 1)
        self.embed_dim = embed_dim

    def forward(self, positions: Tensor) -> Tensor:
        """Integer positions [...] -> float32 [..., embed_dim]."""
        check_positions("positions", positions)
        angles = _angles(positions, (self.embed_dim + 1) // 2, self.embed_dim, 10000.0, torch.float32)
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., : self.embed_dim]

    def extra_repr(self) -> str:
        return f"{self.embed_dim}"


class RotaryPositionEmbedding(nn.Module):
    """Rotates queries or keys by their positions, so that scores depend on distances (RoFormer, arXiv 2104.09864).

    Channel i is paired with channel i + D / 2, as in GPT-NeoX and LLaMA, and the pair is turned by
    ``position * base ** (-2 i / D)``. Position 0 leaves a row as it is. No parameters.

    Args:
        head_dim: D, even.
        base: of the angles' geometric series.

    Shape: x [B, H, L, D] and integer positions [L] or [B, L] -> [B, H, L, D], in x's dtype; the turn is computed in
    float32, of float64 in float64.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        check_int("head_dim", head_dim, 2)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even (channels are rotated in pairs), got {head_dim}")
        check_base("base", base)
        self.head_dim, self.base = head_dim, base

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, H, L, D], positions [L] or [B, L] -> [B, H, L, D]."""
        check_tensor("x", x, "B H L D")
        check_shape("x", x, (*x.shape[:3], self.head_dim))
        check_row_positions("positions", positions, x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        angles = _angles(positions, self.head_dim // 2, self.head_dim, self.base, dtype)
        angles = angles.unsqueeze(-3)  # [B|1, 1, L, D / 2]
        cos, sin = angles.cos(), angles.sin()
        a, b = x.to(dtype).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}"
