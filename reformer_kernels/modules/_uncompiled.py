"""What compilers leave as it is. Imported while one runs: torch.compiler.disable needs all of torch's compiler."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(  # type: ignore[untyped-decorator]  # torch gives it no types
    reason="a reversible sequence reconstructs its activations outside of compiled graphs: for fullgraph=True set "
    "reversible=False (it then stores activations; without gradients it does so anyway), and to keep what reversible "
    "saves, compile without fullgraph, or compile its functions f and g"
)
def call_uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """The function, and all that it calls, in eager mode."""
    return function(*args)
