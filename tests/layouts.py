"""The same values with other strides."""

from collections.abc import Callable

import torch
from torch import Tensor

# Every layout that a view of torch can have with contiguous rows, and one without; each takes a tensor [B, H, L, D].
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "wider rows": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "every other row": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "one head expanded": lambda x: x[:, :1].expand(x.shape),
    "columns apart": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
