"""``python -m reformer_kernels.info`` and what it reports."""

import inspect
import subprocess
import sys

import torch

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels.backends import cuda, native
from reformer_kernels.demo import training


def test_report() -> None:
    run = subprocess.run([sys.executable, "-m", "reformer_kernels.info"], capture_output=True, text=True, check=True)
    for text in (
        rk.__version__,
        torch.__version__,
        native.build_info()["isa_in_use"],
        "CUDA library",
        "serves it",
        "list_attention",
    ):
        assert text in run.stdout
    assert 'cpu        no: rules.own_position="sentinel" is served by the reference only' in run.stdout


def test_what_is_public_outside_of_layers_and_models_is_documented() -> None:
    public = {name: getattr(rk, name) for name in rk.__all__}
    public = {name: x for name, x in public.items() if x.__module__.split(".")[1] not in ("models", "modules")}
    for module in (testing, training):
        mine = {name: x for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__}
        public |= {name: x for name, x in mine.items() if not name.startswith("_")}
    assert {"use_backend", "AttentionRules", "lsh_attention", "Run", "capture"} <= public.keys()
    for name, x in list(public.items()):
        if inspect.isclass(x):
            members = {n: getattr(m, "__func__", m) for n, m in vars(x).items() if not n.startswith("_")}
            public |= {f"{name}.{n}": m for n, m in members.items() if inspect.isfunction(m) or isinstance(m, property)}
    assert [name for name, x in public.items() if not x.__doc__] == []


def test_cuda_library_states_what_it_was_built_for_or_why_not() -> None:
    info = cuda.library()
    if "error" in info:
        assert info["error"]
    else:
        assert info["cuda"] == torch.version.cuda and info["architectures"]
