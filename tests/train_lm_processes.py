"""Run by torchrun, 2 processes: trains a few steps by DDP, goes on by FSDP, and writes what each step said.

In float64, whose rounding no bucket notices.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.examples import load_example


def go_on(
    module: ModuleType, processes: Any, out: Path, arguments: list[str], steps: int, begin: bool = False
) -> list[dict[str, Any]]:
    """The rows of so many steps of a training that goes on behind the checkpoint in ``out``, and leaves one there."""
    options, state = module.parse([*arguments, "--out", str(out)] if begin else [*arguments, "--resume", str(out)])
    training = module.Training(options, module.Text(options), processes)
    if state is not None:
        training.load(state)
    rows = [row for _, row in zip(range(steps), training.steps(), strict=False)]
    training.save(out / "checkpoint.pt")
    return rows


def main(folder: str, *arguments: str) -> None:
    torch.set_default_dtype(torch.float64)
    module, out = load_example("train_lm"), Path(folder)
    processes = module.Processes("ddp")
    rows = go_on(module, processes, out, list(arguments), 3, begin=True)
    torch.distributed.barrier()
    processes.sharded = True
    rows += go_on(module, processes, out, [], 3)
    if processes.rank == 0:
        (out / "rows.json").write_text(json.dumps(rows))
    processes.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
