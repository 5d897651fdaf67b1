"""``python -m benchmarks.worker``: times specs that it reads as lines of JSON, for base.Worker."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import reformer_kernels

from .timing import Timer, build


def main() -> None:
    # Whatever else is printed must not get between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    timer: Timer | None = None

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer({"package": str(Path(reformer_kernels.__file__).parent)})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "build" in request:
                timer = None  # so that the inputs of two do not lie in memory at once
                torch.set_num_threads(request["threads"])
                timer = build(request["build"])
                answer({})
            else:
                assert timer is not None
                answer(timer())
        except Exception as error:  # the asking process decides what to do about it
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
