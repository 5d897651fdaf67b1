"""``python -m reformer_kernels.info`` and what it reports."""

import subprocess
import sys

import torch

import reformer_kernels as rk
from reformer_kernels.backends import cpu, cuda


def test_report() -> None:
    run = subprocess.run([sys.executable, "-m", "reformer_kernels.info"], capture_output=True, text=True, check=True)
    for text in (
        rk.__version__,
        torch.__version__,
        cpu.build_info()["isa_in_use"],
        "CUDA library",
        "serves it",
        "list_attention",
    ):
        assert text in run.stdout


def test_cuda_library_states_what_it_was_built_for_or_why_not() -> None:
    info = cuda.library()
    if "error" in info:
        assert info["error"]
    else:
        assert info["cuda"] == torch.version.cuda and info["architectures"]
