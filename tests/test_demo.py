"""The demo, end to end at a tiny size, and how it refuses bad input."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from reformer_kernels.demo import __main__ as demo
from reformer_kernels.demo import cost, figure, swap, training
from reformer_kernels.demo.model import make_configs
from reformer_kernels.demo.text import DemoError, split_text
from reformer_kernels.models.lm import ReformerLM

ENGLISH = b"The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
LENGTHS = [256, 512]


def make_model(name: str, *, layers: int = 2) -> ReformerLM:
    return ReformerLM(make_configs(context=256, width=32, layers=layers, heads=2, hashes=1)[name])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reformer_kernels.demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_tiny_run_from_end_to_end(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "new" / "out"
    text.write_bytes(ENGLISH * 60)
    done = run(
        *f"--seconds 2 --context 256 --width 32 --layers 2 --heads 2 --lengths 512,256 --repeats 1 --generate 100 "
        f"--swap-length 300 --swap-repeats 1 --text {text} --out {out}".split()
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "(two standard deviations, of other text and other runs)" in done.stdout
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_bytes()) == 100  # behind the prompt, more than the context

    results = json.loads((out / "results.json").read_text())
    assert results["environment"]["torch"] == torch.__version__ and results["environment"]["cores"] >= 1
    assert "isa" in results["environment"]
    assert results["options"]["context"] == 256 and results["options"]["lengths"] == LENGTHS
    points = [(row["length"], row["name"]) for row in results["attention"]]
    assert points == [(length, name) for length in LENGTHS for name in cost.NAMES]
    assert all(row["seconds"] > 0 and row["extra_bytes"] > 0 and row["calls"] == 1 for row in results["attention"])
    swapped = results["swap"]
    assert swapped["length"] == 300 and swapped["seconds"].keys() == {"stock", "swapped"}
    assert 0 <= swapped["short_difference"] < 1e-5
    for name in figure.MODELS:
        trained = results["training"][name]
        assert trained["after"] < trained["before"], name
        assert trained["curve"][0] == [0.0, trained["before"]] and trained["curve"][-1][1] == trained["after"]
        assert trained["steps"] >= 1
    after = {name: results["training"][name]["after"] for name in figure.MODELS}
    assert results["difference"]["bits"] == pytest.approx(after["lsh"] - after["sdpa"])
    assert results["difference"]["spread"] > 0
    assert 190 <= len(results["sample"]["prompt"]) <= 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "missing.txt"], "cannot read 'missing.txt': No such file"),
        (["--text", "."], "cannot read '.': Is a directory"),
        (["--text", "empty.txt"], "has 0 bytes, too few"),
        (["--text", "short.txt"], "--context 4096 needs at least 40,970"),
        (["--text", "short.txt", "--out", "short.txt"], "too few"),
        (["--context", "256", "--text", "short.txt", "--out", "short.txt"], "cannot make the folder 'short.txt'"),
        (["--width", "130", "--heads", "4"], "--width must be divisible by twice --heads, got 130 and 4"),
        (["--width", "130", "--heads", "2"], "--width must be divisible by twice --heads, got 130 and 2"),
        (["--seconds", "0"], "--seconds: must be a positive number, got '0'"),
        (["--seconds", "nan"], "--seconds: must be a positive number, got 'nan'"),
        (["--context", "1"], "--context: must be an integer of at least 2, got '1'"),
        (["--layers", "two"], "--layers: must be an integer of at least 1, got 'two'"),
        (["--lengths", "1024,,2048"], "--lengths: must be an integer of at least 1, got ''"),
        (["--lengths", "-5"], "--lengths"),
        (["--seed", "-1"], "--seed: must be an integer of at least 0, got '-1'"),
        (["--lr", "inf"], "--lr: must be a positive number, got 'inf'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("short.txt").write_bytes(ENGLISH * 50)
    code: str | int | None
    try:
        code = demo.main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and message in captured.err


def test_error_line_of_the_real_process() -> None:
    done = run("--text", "/no/such/file")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "reformer_kernels.demo: cannot read '/no/such/file': No such file or directory\n"


@pytest.mark.parametrize("module", ["matplotlib", "tqdm"])
def test_missing_extra_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert demo.main([]) == 2
    assert capsys.readouterr().err == (
        f"reformer_kernels.demo: {module} is missing: pip install reformer_kernels[demo]\n"
    )


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    parser = demo._parser()
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for action in parser._actions:
        assert action.help, action.dest
        for option in action.option_strings:
            assert re.search(rf"{option}\b", shown), option


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [32, 128, 512])
def test_models_differ_in_attention_only(layers: int, width: int) -> None:
    configs = make_configs(context=4096, width=width, layers=layers, heads=2, hashes=2)
    assert list(configs) == list(figure.MODELS)
    assert configs["lsh"].layers == ("local", "lsh", "local", "lsh")[:layers]
    assert set(configs["sdpa"].layers) == {"full"} and configs["lsh"].n_buckets == 64
    sizes = [sum(x.numel() for x in ReformerLM(config).parameters()) for config in configs.values()]
    assert abs(sizes[0] - sizes[1]) <= layers * (width + 1)  # half a unit of each feed-forward layer
    assert abs(sizes[0] - sizes[1]) <= 0.01 * min(sizes)
    own = {"attention", "alignment", "n_hashes", "n_buckets", "feed_forward_dim"}
    first, second = ({k: v for k, v in config.to_dict().items() if k not in own} for config in configs.values())
    assert first == second


@pytest.mark.parametrize("name", figure.MODELS)
def test_models_are_strictly_causal(name: str) -> None:
    model = make_model(name, layers=4).eval()
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.3)
    tokens = torch.randint(256, (1, 256))
    changed = tokens.clone()
    changed[0, 200] = (changed[0, 200] + 1) % 256
    with torch.no_grad():
        difference = (model(tokens)[0] - model(changed)[0]).abs().amax(-1)[0]
    assert float(difference[200:].max()) > 0
    assert float(difference[:200].max()) == 0


def test_text_is_split_behind_nine_tenths() -> None:
    train, held_out = split_text(bytes(range(100)), 9)
    assert train.tolist() == list(range(90)) and held_out.tolist() == list(range(90, 100))
    with pytest.raises(DemoError, match="needs at least 110"):
        split_text(bytes(100), 10)


def test_cost_process_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(DemoError, match="LSH attention at L 64 could not be measured: its process ended with code 1"):
        list(cost.measure([64], 1, 1.0, iter))


def test_a_difference_spreads_over_parts_of_the_text() -> None:
    a, b = torch.full((3000,), 2.0).double(), torch.full((3000,), 1.5).double()
    assert training.difference(a, b) == (0.5, training.RUN_SPREAD)
    noise = torch.randn(3000, dtype=torch.float64)
    bits, spread = training.difference(b + noise, b)
    assert abs(bits - noise.mean()) < 1e-12
    of_text = (spread**2 - training.RUN_SPREAD**2) ** 0.5
    assert of_text == pytest.approx(2 / 3000**0.5, rel=0.5)  # twice the standard error of a mean, from 20 samples of it
    assert training.difference(-noise, noise)[1] == pytest.approx(math.hypot(2 * of_text, training.RUN_SPREAD))
    assert training.difference(a[:1], b[:1]) == (0.5, math.inf)


def test_held_out_bits_are_those_of_every_byte() -> None:
    model = make_model("sdpa")
    data = torch.randint(256, (40,))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.linspace(0, 3, 256))
    exact, same_dtype = (
        -torch.log_softmax(bias, 0)[data[1:]].double() / math.log(2)
        for bias in (model.head.bias.double(), model.head.bias)
    )
    # Twice the error of the same formula in float32, and one rounding.
    allowed = 2 * (same_dtype - exact).abs().max() + torch.finfo(torch.float32).eps * exact.max()
    assert (training.bits_of_bytes(model, data, 16, 1) - exact).abs().max() <= allowed


def test_held_out_bits_take_the_hashes_of_evaluation() -> None:
    model = make_model("lsh")
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.3)
    data = torch.randint(256, (257,))
    with torch.no_grad():
        logits = model.eval()(data[None, :-1], n_hashes=4).logits[0]
    exact = torch.nn.functional.cross_entropy(logits, data[1:], reduction="none").double() / math.log(2)
    assert training.bits_of_bytes(model, data, 256, 4).equal(exact)
    assert not training.bits_of_bytes(model, data, 256, 1).equal(exact)


def test_the_sample_is_generated_by_the_cache() -> None:
    model = make_model("lsh")
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.3)
    prompt = torch.randint(256, (20,))
    expected = model.generate(
        prompt[None], max_new_tokens=100, do_sample=True, temperature=0.5, generator=torch.Generator().manual_seed(7)
    )
    tokens = []  # of each forward
    model.reformer.embedding.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
    totals = []

    def progress(iterable: Iterator[Any], total: int) -> Iterator[Any]:
        totals.append(total)
        return iterable

    sample = training.generate(model, prompt, 100, temperature=0.5, seed=7, progress=progress)
    assert list(sample) == expected[0, 20:].tolist()
    assert totals == [100]
    assert tokens == [20] + 99 * [1]  # no token is computed twice
    assert sample != training.generate(model, prompt, 100, temperature=0.5, seed=8, progress=progress)


@pytest.mark.parametrize(
    ("bits", "spread", "said"),
    [
        (-0.07, 0.01, "Local + LSH attention wins by 0.070 +- 0.010 bits per byte"),
        (0.07, 0.01, "torch SDPA wins by 0.070 +- 0.010 bits per byte"),
        (-0.001, 0.004, "no difference: 0.001 bits per byte are within the spread of 0.004"),
        (0.004, 0.004, "no difference"),
        (0.5, math.inf, "no difference"),
        (0.0, 0.0, "no difference"),
    ],
)
def test_only_more_than_the_spread_is_a_win(bits: float, spread: float, said: str) -> None:
    assert demo._verdict(bits, spread).startswith(said)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Stages that take no time, of which the named one is interrupted."""

    def replace(interrupted: str) -> None:
        def stage(name: str, result: Any) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                if name == interrupted:
                    raise KeyboardInterrupt
                return result

            return run

        def lengths(*arguments: Any) -> Iterator[list[dict[str, Any]]]:
            for length in LENGTHS:
                if interrupted == f"length {length}":
                    raise KeyboardInterrupt
                row = {"length": length, "seconds": 1.0, "calls": 1, "extra_bytes": 1}
                yield [{"name": name, **row} for name in cost.NAMES]

        swapped = {
            "length": 300,
            "short_length": 100,
            "short_difference": 0.0,
            "seconds": {"stock": 2.0, "swapped": 1.0},
        }
        trained = training.Run(
            make_model("lsh"), torch.zeros(200).long(), torch.zeros(100).long(),
            seconds=1.0, context=16, learning_rate=0.1, eval_hashes=1, seed=0,
        )  # fmt: skip
        trained.evaluate()
        trained.steps = 1
        monkeypatch.setattr(cost, "measure", lengths)
        monkeypatch.setattr(swap, "measure", stage("swap", swapped))
        monkeypatch.setattr(demo, "_train", stage("training", dict.fromkeys(figure.MODELS, trained)))
        monkeypatch.setattr(training, "generate", stage("sample", b"text"))

    return replace


@pytest.mark.parametrize(
    ("interrupted", "finished"),
    [
        ("length 256", []),
        ("length 512", ["attention"]),
        ("swap", ["attention"]),
        ("training", ["attention", "swap"]),
        ("sample", ["attention", "swap", "training", "difference"]),
        ("", ["attention", "swap", "training", "difference", "sample"]),
    ],
)
def test_what_was_finished_before_an_interruption_is_kept_and_shown(
    interrupted: str, finished: list[str], stages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("attention.png", "sample.txt"):
        (tmp_path / name).write_text("of an earlier run")
    stages(interrupted)
    code = demo.main(["--out", str(tmp_path), "--context", "256"])
    out, error = capsys.readouterr()
    results = json.loads((tmp_path / "results.json").read_text()) if finished else {}
    assert list(results) == (["environment", "options", *finished] if finished else [])
    if interrupted:
        kept = f"{tmp_path / 'results.json'} has what was finished: {', '.join(finished)}"
        assert code == 130
        assert error == f"\nreformer_kernels.demo: interrupted; {kept if finished else 'nothing finished'}\n"
    else:
        assert (code, error) == (0, "")
    shown = {
        "attention": "     256  ",
        "swap": "The one-line swap",
        "training": "no difference",
        "sample": "\u2588text",
    }
    assert [part for part, text in shown.items() if text in out] == [part for part in finished if part in shown]
    assert len(results.get("attention", [])) == {"length 256": 0, "length 512": 2}.get(interrupted, 4)
    if finished:  # nothing of the earlier run lies beside the new numbers
        drawn = [path.name for path in tmp_path.iterdir() if path.read_bytes() != b"of an earlier run"]
        assert ("attention.png" in drawn) == ("training" in finished) and ("sample.txt" in drawn) == (
            "sample" in finished
        )
        assert len(list(tmp_path.iterdir())) == len(drawn)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A job in the background of a shell ignores SIGINT, and so would what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_terminal_ends_all_processes_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reformer_kernels.demo", "--out", str(tmp_path), "--lengths", "256"]
    command += ["--repeats", "1000000", "--point-seconds", "1000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("torch ")  # the first measuring process is about to start
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        try:
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()  # or a failure would wait for it to end
    assert process.returncode == 130
    assert error.endswith("\nreformer_kernels.demo: interrupted; nothing finished\n") and "Traceback" not in error


def test_the_ctrl_c_of_a_terminal_does_not_reach_the_measuring_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "yes")
    with ExitStack() as stack:
        point = cost._Point(stack, "lsh", 64)
        assert os.getpgid(point.process.pid) != os.getpgid(0)
