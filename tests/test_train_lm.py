"""examples/train_lm.py: stops and resumes to the bit, on one process and two, and says what is wrong."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import reformer_kernels as rk
from benchmarks.examples import FOLDER, load_example

from .train_lm_processes import go_on

FILE, ROOT = FOLDER / "train_lm.py", FOLDER.parent
SMALL = (
    "--batch 4 --context 96 --width 32 --heads 2 --layers 2 --hashes 2 --chunk-length 16 --warm-up 2 --dropout 0.1 "
    "--validate-every 3 --validation-batches 1 --save-every 4 --sample 20"
).split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def train_lm() -> ModuleType:
    return load_example("train_lm")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few source files."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "inside").mkdir()
    for i, name in enumerate(("a.py", "inside/b.py", "c.py")):
        (folder / name).write_text("".join(f"def f{j}(x):\n    return x + {j * (i + 1)}\n" for j in range(400)))
    (folder / "notes.txt").write_text("not source")
    return folder


def logged(out: Path) -> list[dict[str, str]]:
    """What the log says, but for the seconds that it took."""
    with (out / "log.csv").open(newline="") as f:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(f)]


def test_trains_and_writes(
    train_lm: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "a"
    train_lm.main([str(text), *SMALL, "--steps", "30", "--learning-rate", "0.01", "--out", str(out)])
    rows = logged(out)
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])
    assert [row["step"] for row in rows if row["validation_loss"]] == [str(i) for i in range(3, 31, 3)]
    assert abs(float(rows[-1]["validation_loss"]) - float(rows[-1]["loss"])) < 0.5
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    written = (out / "sample.txt").read_text()
    prompt, new = written.split("\n\n---- the model goes on ----\n\n")
    assert "def f" in prompt
    assert 0 < len(new.encode(errors="replace")) <= 20 * 3 + 1  # what is no UTF-8 is shown as 3 bytes
    assert written in capsys.readouterr().out
    model = rk.ReformerLM.from_pretrained(out / "model")
    assert model.config.alignment is None and model.config.lsh_alignment == "bucket"
    options = train_lm.parse(["--resume", str(out)])[0]
    held_out = train_lm.Text(options)
    assert train_lm.sample(model, held_out, options) == written
    ids = train_lm.validation_windows(held_out, options)
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert loss == pytest.approx(float(rows[-1]["validation_loss"]), rel=1e-5)


def test_goes_on_after_a_kill(
    train_lm: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at any moment: the steps since the last checkpoint are done again, to the same bits."""
    arguments = [str(text), *SMALL, "--steps", "40"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_lm.main([*arguments, "--out", str(whole)])
    command = [sys.executable, str(FILE), *arguments, "--out", str(killed)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoint.pt").exists() or len(logged(killed)) < 6:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(logged(killed))
    assert done < 40
    with (killed / "log.csv").open("a") as f:
        f.write("41,7")  # a line that was not finished
    step = torch.load(killed / "checkpoint.pt", weights_only=True)["step"]
    assert step % 4 == 0 and 0 < step <= done
    torch.manual_seed(99)
    train_lm.main(["--resume", str(killed)])
    assert logged(killed) == logged(whole)
    weights = [rk.ReformerLM.from_pretrained(out / "model").state_dict() for out in (whole, killed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (killed / "sample.txt").read_text() == (whole / "sample.txt").read_text()
    capsys.readouterr()
    train_lm.main(["--resume", str(killed)])  # nothing is left to train
    assert f"held out: {float(logged(whole)[-1]['validation_loss']):.4f} nats" in capsys.readouterr().out


def test_a_checkpoint_is_whole_or_not_there(
    train_lm: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = train_lm.Processes("ddp")
    go_on(train_lm, processes, tmp_path, [str(text), *SMALL], 1, begin=True)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def is_stopped(state: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", is_stopped)
    with pytest.raises(KeyboardInterrupt):
        go_on(train_lm, processes, tmp_path, [], 1)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_two_processes_are_one(train_lm: ModuleType, text: Path, tmp_path: Path) -> None:
    """Three steps by DDP, three by FSDP from its checkpoint, three on one process from that of FSDP."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [str(text), *SMALL, "--steps", "9"]
    for folder in (one, two):
        folder.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "tests.train_lm_processes", str(two), *arguments]
    ran = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    torch.set_default_dtype(torch.float64)
    try:
        processes = train_lm.Processes("ddp")
        expected = go_on(train_lm, processes, one, arguments, 9, begin=True)
        rows = json.loads((two / "rows.json").read_text()) + go_on(train_lm, processes, two, [], 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [row["step"] for row in rows] == list(range(1, 10))
    for row, like in zip(rows, expected, strict=True):
        # Sums of four gradients and of squares in another order: 1e-16 each, which Adam's first steps may enlarge.
        for name in ("loss", "gradient_norm", "validation_loss"):
            expect = like[name] if like[name] == "" else pytest.approx(like[name], rel=1e-11)
            assert row[name] == expect, (name, row["step"])
    assert len({row["loss"] for row in rows}) == 9


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.full), "fsdp"])  # ddp is in the one above
def test_torchrun(train_lm: ModuleType, text: Path, tmp_path: Path, parallel: str) -> None:
    """The command of the README, whose log one process goes on with."""
    arguments = [str(text), *SMALL, "--steps", "4", "--micro-batch", "2", "--parallel", parallel]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(FILE)]
    ran = subprocess.run(
        [*torchrun, *arguments, "--out", str(tmp_path)], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("held out: ") == 1  # the first process alone writes
    assert len(logged(tmp_path)) == 4
    assert (tmp_path / "sample.txt").exists()
    train_lm.main(["--resume", str(tmp_path), "--steps", "6"])
    assert [row["step"] for row in logged(tmp_path)] == list("123456")


def test_accumulation_is_the_mean_of_its_parts(train_lm: ModuleType, text: Path, tmp_path: Path) -> None:
    """One step of plain gradient descent by hand."""
    options, _ = train_lm.parse([str(text), *SMALL, "--steps", "1", "--clip", "0.5", "--out", str(tmp_path / "x")])
    training = train_lm.Training(options, train_lm.Text(options), train_lm.Processes("ddp"))
    torch.manual_seed(0)
    model = rk.ReformerLM(train_lm.make_config(options, 256)).train()
    losses = []
    for piece in range(4):
        ids = train_lm.training_windows(training.text, options, 0, piece)
        assert ids.shape == (1, 96)
        losses.append(model(ids, labels=ids).loss)
    torch.stack(losses).mean().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    (row,) = training.steps()
    assert row["loss"] == pytest.approx(float(torch.stack(losses).detach().mean()), rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert float(norm) > 0.5  # or clipping would do nothing


def test_another_weight_decay_counts_after_a_stop(train_lm: ModuleType, text: Path, tmp_path: Path) -> None:
    processes = train_lm.Processes("ddp")
    go_on(train_lm, processes, tmp_path, [str(text), *SMALL], 1, begin=True)
    options, state = train_lm.parse(["--resume", str(tmp_path), "--weight-decay", "0.7"])
    training = train_lm.Training(options, train_lm.Text(options), processes)
    training.load(state)
    next(training.steps())
    assert [group["weight_decay"] for group in training.optimiser.param_groups] == [0.7, 0.0]


def test_learning_rate(train_lm: ModuleType, text: Path, tmp_path: Path) -> None:
    arguments = "--steps 12 --warm-up 4 --learning-rate 0.5".split()
    options, _ = train_lm.parse([str(text), *SMALL, *arguments, "--out", str(tmp_path)])
    training = train_lm.Training(options, train_lm.Text(options), train_lm.Processes("ddp"))
    rates = []
    for training.step in range(13):
        rates.append(training.learning_rate())
    assert rates[:5] == [0.125, 0.25, 0.375, 0.5, 0.5]
    assert rates[8] == pytest.approx(0.275)
    assert rates[12] == pytest.approx(0.05)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_bf16(train_lm: ModuleType, text: Path, tmp_path: Path) -> None:
    rows = {}
    for precision in ("float32", "bf16"):
        out = tmp_path / precision
        out.mkdir()
        rows[precision] = go_on(train_lm, train_lm.Processes("ddp"), out, [str(text), *SMALL, "--precision", precision],
                                2, begin=True)  # fmt: skip
    whole, half = (rows[name][1]["loss"] for name in rows)
    assert 0 < abs(whole - half) < 8 * 2**-8 * whole


def test_tokenizer(train_lm: ModuleType, text: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train([str(text / "a.py")], trainer)
    folder = tmp_path / "tokenizer"
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(folder)
    out = tmp_path / "out"
    train_lm.main([str(text), *SMALL, "--steps", "2", "--tokenizer", str(folder), "--out", str(out)])
    options = train_lm.parse(["--resume", str(out)])[0]
    tokens = train_lm.Text(options)
    assert tokens.vocab_size == rk.ReformerLM.from_pretrained(out / "model").config.vocab_size == 300
    both = torch.cat([tokens.train, tokens.held_out])
    assert int((both == 0).sum()) == 3  # an end behind each document
    documents = [tokens.decode(part) for part in both.tensor_split((both == 0).nonzero()[:, 0] + 1)[:3]]
    assert sorted(documents) == sorted((text / name).read_text() + "<end>" for name in ("a.py", "inside/b.py", "c.py"))


def test_text(train_lm: ModuleType, text: Path) -> None:
    def parts(*arguments: str) -> tuple[bytes, bytes, str]:
        made = train_lm.Text(train_lm.parse([*arguments, *SMALL, "--out", "nowhere"])[0])
        return bytes(made.train.tolist()), bytes(made.held_out.tolist()), made.digest

    files = [(text / name).read_bytes() + b"\0" for name in ("a.py", "c.py", "inside/b.py")]
    train, held_out, digest = parts(str(text), "--seed", "1")
    assert sorted((train + held_out).split(b"\0")) == sorted(file[:-1] for file in [*files, b"\0"])
    assert len(held_out) == pytest.approx(0.05 * sum(map(len, files)), abs=1)
    orders = {parts(str(text), "--seed", str(seed))[2] for seed in range(8)}
    assert digest in orders and len(orders) > 1
    assert parts(str(text / "notes.txt"), str(text / "a.py"), "--held-out", "0.5")[1]
    library = train_lm.documents(train_lm.parse(["--out", "nowhere"])[0].files, ".py")
    assert any(file.name == "argparse.py" for file in library)
    assert not any("site-packages" in file.parts for file in library)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be an integer of at least 1, got '0'"),
        (["--context", "1.5"], "--context: must be an integer of at least 2, got '1.5'"),
        (["--learning-rate", "0"], "--learning-rate: must be a number above 0, got '0'"),
        (["--clip", "inf"], "--clip: must be a number above 0, got 'inf'"),
        (["--dropout", "1"], "--dropout: must be a number of at least 0 and below 1, got '1'"),
        (["--weight-decay", "x"], "--weight-decay: must be a number of at least 0, got 'x'"),
        (["missing.txt"], "there is no file or folder 'missing.txt'"),
        (["--suffix", ".c"], "has no files that end in '.c' (--suffix)"),
        (["--context", "40000"], "--context 40000: the text has "),
        (
            ["--batch", "3", "--micro-batch", "2"],
            "--batch must be a multiple of --micro-batch 2 times 1 processes, got 3",
        ),
        (["--width", "34", "--heads", "2"], "--width must be a multiple of twice --heads 2, got 34"),
        (["--buckets", "3"], "--buckets must be even, got 3"),
        (["--held-out", "0"], "--held-out: must be a number above 0 and below 1, got '0'"),
        (["--parallel", "fsdp"], "--parallel fsdp needs torchrun"),
        (["--resume", "missing"], "--resume: there is no 'missing/checkpoint.pt'"),
    ],
)
def test_wrong_options(
    train_lm: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    files = [] if "missing.txt" in arguments else [str(text)]
    with pytest.raises(SystemExit) as error:
        train_lm.main([*files, *SMALL, *arguments, "--out", str(tmp_path)])
    assert message in f"{error.value} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


def test_wrong_checkpoints(
    train_lm: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = train_lm.Processes("ddp")
    file, arguments = tmp_path / "a.py", [*SMALL, "--steps", "9"]
    file.write_bytes((text / "a.py").read_bytes())
    go_on(train_lm, processes, tmp_path, [str(file), *arguments], 2, begin=True)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit):
        train_lm.main([str(file), *arguments, "--out", str(tmp_path)])
    assert "has a checkpoint; --resume it, or name another folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_lm.main(["--resume", str(tmp_path), "--out", "elsewhere"])
    assert "--out must not be given with --resume, whose folder it is, got 'elsewhere'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="the text is not the one of the checkpoint"):
        train_lm.main(["--resume", str(tmp_path), "--held-out", "0.3"])
    with pytest.raises(SystemExit, match="--steps must be at least 2, which are done, got 1"):
        train_lm.main(["--resume", str(tmp_path), "--steps", "1"])
    with pytest.raises(SystemExit, match="the text is not the one of the checkpoint"):
        train_lm.main(["--resume", str(tmp_path), "--seed", "1", str(text)])
    with pytest.raises(SystemExit, match=r"model of the checkpoint has embed_dim 32 and not 64$"):
        train_lm.main(["--resume", str(tmp_path), "--width", "64"])
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert len(go_on(train_lm, processes, tmp_path, ["--store-activations"], 1)) == 1  # changes no weight


def test_a_loss_that_is_not_finite(train_lm: ModuleType, text: Path, tmp_path: Path) -> None:
    options, _ = train_lm.parse([str(text), *SMALL, "--out", str(tmp_path)])
    training = train_lm.Training(options, train_lm.Text(options), train_lm.Processes("ddp"))
    with torch.no_grad():
        training.reformer.head.bias[3] = float("inf")
    with pytest.raises(SystemExit, match=r"step 1: the loss is .* Try a lower --learning-rate than 0\.002"):
        next(training.steps())
