"""Run by wheels.py in an environment that holds torch and a wheel, with nothing else: does the wheel work?"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels import info
from reformer_kernels.backends import cpu, cuda


def check_library(kind: str) -> None:
    """The libraries are those of the wheel, and load, or say why not."""
    found = sorted(path.name for path in Path(rk.__file__).parent.glob("*.so"))
    assert found == ["_cpu.abi3.so"] + ["_cuda.abi3.so"] * (kind == "cuda"), found
    assert "error" not in cpu.build_info(), cpu.build_info()
    error = cuda.library().get("error")
    if kind == "cpu":
        assert error == "the build was told REFORMER_KERNELS_BUILD_CUDA=0", error
    elif torch.version.cuda:
        assert not error, error
    else:
        assert error == f"torch {torch.__version__} is not a CUDA build", error


def check_functions() -> None:
    """Each function by the native kernels, forward and backward, against the reference."""
    # In float64 both round alike enough to choose the same buckets and keys.
    query, key, value = torch.randn(3, 2, 4, 512, 32, dtype=torch.float64).unbind()
    calls: dict[str, Callable[..., Tensor]] = {
        "lsh_attention": lambda q, k, v, b: rk.lsh_attention(q, v, causal=True, backend=b),
        "local_attention": lambda q, k, v, b: rk.local_attention(q, k, v, causal=True, backend=b),
        "clustered_attention": lambda q, k, v, b: rk.clustered_attention(q, k, v, backend=b),
    }
    for name, call in calls.items():
        results = []
        for backend in ("cpu", "reference"):
            inputs = [x.clone().requires_grad_() for x in (query, key, value)]
            out = call(*inputs, backend)
            grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True, materialize_grads=True)
            results.append((out.detach(), *grads))
        for ours, reference in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference)
        print(f"  {name} agrees with the reference")


def check_models(folder: Path) -> None:
    """The drop-in in a stock model, and a model of ours trained, saved and read."""
    layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert len(rk.convert_attention(model)) == 2
    model(torch.randn(1, 2048, 64)).sum().backward()
    lm = rk.ReformerLM(rk.ReformerConfig(vocab_size=32, embed_dim=32, num_layers=2, num_heads=2))
    ids = torch.randint(32, (1, 256))
    lm(ids, labels=ids).loss.backward()
    lm.save_pretrained(folder)
    again = rk.ReformerLM.from_pretrained(folder)
    torch.testing.assert_close(again.eval()(ids).logits, lm.eval()(ids).logits)


def main() -> None:
    kind = sys.argv[1]
    compilers = [name for name in ("cc", "c++", "gcc", "g++", "clang", "nvcc", "ninja") if shutil.which(name)]
    assert not compilers, compilers
    assert Path(rk.__file__).is_relative_to(sys.prefix), rk.__file__
    torch.manual_seed(0)
    check_library(kind)
    check_functions()
    check_models(Path(sys.prefix) / "saved")
    report = info.report()
    assert "serves it" in report
    print("\n".join(f"  {line}" for line in report.splitlines()[:4]))


if __name__ == "__main__":
    main()
