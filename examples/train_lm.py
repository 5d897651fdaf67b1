"""Trains a ReformerLM on text or source files: on one process or many, stopped and resumed, to the same losses.

    python examples/train_lm.py                            # Python's own library, bytes as tokens
    python examples/train_lm.py book.txt src/ --steps 2000 --tokenizer gpt2 --out runs/book
    python examples/train_lm.py --resume runs/book         # after it was stopped, however that came
    torchrun --nproc-per-node 2 examples/train_lm.py --parallel fsdp

A step is ``--batch`` windows of the text in pieces of ``--micro-batch``, which the processes share out. What is random
in a piece depends on the seed, the step and the piece alone. So neither a stop nor the number of processes changes it.

The folder ``--out`` gets log.csv, loss.png, sample.txt, checkpoint.pt, and the trained model in model/.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import reformer_kernels as rk

COLUMNS = ("step", "seconds", "learning_rate", "loss", "gradient_norm", "validation_loss")
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


# ---- the text


def documents(paths: Sequence[Path], suffix: str) -> list[Path]:
    """The files, and those with this suffix in the folders, but for ``site-packages`` in them."""
    found = []
    for path in paths:
        if path.is_dir():
            inside = [p for p in path.rglob(f"*{suffix}") if p.is_file()]
            inside = [p for p in inside if "site-packages" not in p.relative_to(path).parts]
            if not inside:
                sys.exit(f"FILE: the folder {str(path)!r} has no files that end in {suffix!r} (--suffix)")
            found += sorted(inside)
        elif not path.is_file():
            sys.exit(f"FILE: there is no file or folder {str(path)!r}")
        else:
            found.append(path)
    return found


class Text:
    """Tokens of all documents in an order drawn by the seed; the last of them are held out.

    Attributes:
        train, held_out: [n], uint8 for bytes and int32 for the tokens of a tokenizer.
        vocab_size: V.
        digest: of all tokens, and where they are cut.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.tokenizer: Any = None
        self.vocab_size, self._between = 256, [0]
        kind: type[np.generic] = np.uint8
        if options.tokenizer:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
            end = self.tokenizer.eos_token_id
            self.vocab_size, self._between, kind = len(self.tokenizer), [] if end is None else [end], np.int32
        files = documents(options.files, options.suffix)
        parts = []
        for i in np.random.default_rng(options.seed).permutation(len(files)):
            parts += [np.asarray(self.encode(files[i].read_bytes()), kind), np.asarray(self._between, kind)]
        tokens = np.concatenate(parts)
        cut = int(len(tokens) * (1 - options.held_out))
        self.digest = hashlib.sha256(tokens.tobytes() + str(cut).encode()).hexdigest()
        if min(cut, len(tokens) - cut) <= options.context:
            sys.exit(
                f"--context {options.context}: the text has {cut:,} tokens and {len(tokens) - cut:,} held out "
                f"(--held-out {options.held_out:g}); both must be more than a window"
            )
        self.train, self.held_out = torch.from_numpy(tokens[:cut]), torch.from_numpy(tokens[cut:])

    def encode(self, text: bytes) -> Any:
        if self.tokenizer is None:
            return np.frombuffer(text, np.uint8)
        return self.tokenizer(text.decode(errors="replace"), add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: Tensor) -> str:
        if self.tokenizer is None:
            return bytes(tokens.tolist()).decode(errors="replace")
        return str(self.tokenizer.decode(tokens))


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def training_windows(text: Text, options: argparse.Namespace, step: int, piece: int) -> Tensor:
    """int64 [micro_batch, context] from anywhere; also seeds what is random in the model."""
    torch.manual_seed(seed_of(options.seed, step, piece))
    starts = torch.randint(len(text.train) - options.context, (options.micro_batch,))
    return torch.stack([text.train[i : i + options.context] for i in starts.tolist()]).long()


def validation_windows(text: Text, options: argparse.Namespace) -> Tensor:
    """int64 [validation_batches * batch, context], evenly from what is held out."""
    count = options.validation_batches * options.batch
    starts = torch.linspace(0, len(text.held_out) - options.context, count, dtype=torch.float64).long()
    return torch.stack([text.held_out[i : i + options.context] for i in starts.tolist()]).long()


# ---- the model, on one process or several


class Processes:
    """Those of torchrun, or this one alone.

    Attributes:
        rank, count: this one of how many.
        device: of this one.
    """

    def __init__(self, parallel: str | None) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.together = "WORLD_SIZE" in os.environ
        self.sharded = parallel == "fsdp"
        if self.sharded and not self.together:
            sys.exit("--parallel fsdp needs torchrun: torchrun --nproc-per-node N examples/train_lm.py --parallel fsdp")
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.together:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def wrap(self, model: rk.ReformerLM) -> torch.nn.Module:
        if not self.together:
            return model
        if not self.sharded:
            return DistributedDataParallel(model)
        for block in model.reformer.layers.blocks:
            fully_shard(block)
        fully_shard(model)
        return model

    def accumulating(self, model: torch.nn.Module, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged after the last piece of a step only."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()

    def mean(self, x: Tensor) -> float:
        if self.together:
            dist.all_reduce(x)
        return float(x) / self.count

    def close(self) -> None:
        if self.together:
            dist.destroy_process_group()


def make_config(options: argparse.Namespace, vocab_size: int) -> rk.ReformerConfig:
    return rk.ReformerConfig(
        vocab_size=vocab_size, embed_dim=options.width, num_layers=options.layers, num_heads=options.heads,
        attention=tuple(options.attention), alignment=options.alignment, shift_keys=options.shift_keys,
        n_hashes=options.hashes, n_buckets=options.buckets, feed_forward_dim=options.feed_forward,
        lsh_chunk_length=options.chunk_length, local_chunk_length=options.chunk_length,
        attention_dropout=options.dropout, hidden_dropout=options.dropout,
        position="rotary", max_length=options.context, reversible=not options.store_activations,
        initializer_range=0.05,  # learns faster than 0.02 at these widths: by 0.2 bits a byte after 300 steps
    )  # fmt: skip


class Training:
    """One training: ``steps()`` goes on with it from where it is, and ``save`` and ``load`` keep that place."""

    def __init__(self, options: argparse.Namespace, text: Text, processes: Processes) -> None:
        self.options, self.text, self.processes = options, text, processes
        self.pieces = options.batch // options.micro_batch
        if options.batch % (options.micro_batch * processes.count):
            sys.exit(
                f"--batch must be a multiple of --micro-batch {options.micro_batch} times {processes.count} "
                f"processes, got {options.batch}"
            )
        torch.manual_seed(options.seed)
        self.reformer = rk.ReformerLM(make_config(options, text.vocab_size)).to(processes.device)
        self.model = processes.wrap(self.reformer)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimiser = torch.optim.AdamW([{"params": matrices}, {"params": others}], betas=(0.9, 0.95))
        self.validation = validation_windows(text, options)
        self.step, self.seconds = 0, 0.0

    def learning_rate(self) -> float:
        """Of the next step: a linear warm-up, then a cosine down to a tenth."""
        o = self.options
        if self.step < o.warm_up:
            part = (self.step + 1) / o.warm_up
        else:
            part = 0.55 + 0.45 * math.cos(math.pi * (self.step - o.warm_up) / (o.steps - o.warm_up))
        return float(part * o.learning_rate)

    def loss(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.processes.device)
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            loss: Tensor = self.model(ids, labels=ids).loss
        return loss

    def validate(self) -> float:
        """Mean loss of a token of the windows that are held out, in evaluation mode."""
        self.model.eval()
        own = self.validation.split(self.options.micro_batch)[self.processes.rank :: self.processes.count]
        with torch.no_grad():
            loss = torch.stack([self.loss(ids) for ids in own]).mean()
        self.model.train()
        return self.processes.mean(loss)

    def steps(self) -> Iterator[dict[str, Any]]:
        """The remaining steps: what the log says of each."""
        o = self.options
        self.model.train()
        while self.step < o.steps:
            begin = time.perf_counter()
            rate = self.learning_rate()
            for group, decay in zip(self.optimiser.param_groups, (o.weight_decay, 0.0), strict=True):
                group["lr"], group["weight_decay"] = rate, decay
            own = range(self.processes.rank, self.pieces, self.processes.count)
            loss = torch.zeros((), device=self.processes.device)
            for piece in own:
                with self.processes.accumulating(self.model, piece == own[-1]):
                    part = self.loss(training_windows(self.text, o, self.step, piece)) / len(own)
                    part.backward()
                loss += part.detach()
            norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), o.clip)
            norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            mean = self.processes.mean(loss)
            if not math.isfinite(mean + norm):
                sys.exit(
                    f"step {self.step + 1}: the loss is {mean} and the norm of its gradient {norm}; the model of the "
                    f"last checkpoint is as it was. Try a lower --learning-rate than {o.learning_rate:g}"
                )
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.step += 1
            self.seconds += time.perf_counter() - begin
            row = {
                "step": self.step, "seconds": round(self.seconds, 3), "learning_rate": rate, "loss": mean,
                "gradient_norm": norm, "validation_loss": "",
            }  # fmt: skip
            if self.step % o.validate_every == 0 or self.step == o.steps:
                row["validation_loss"] = self.validate()
            yield row

    def save(self, file: Path) -> None:
        """Every process has to call it; a checkpoint of any number of processes loads in any other."""
        model, optimiser = get_state_dict(self.model, self.optimiser, options=WHOLE)
        if self.processes.rank:
            return
        state = {
            "step": self.step, "seconds": self.seconds, "digest": self.text.digest, "model": model,
            "optimizer": optimiser, "options": saved(self.options), "config": self.reformer.config.to_json(),
        }  # fmt: skip
        beside = file.with_suffix(".tmp")
        with beside.open("wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        beside.replace(file)  # at once: whoever looks finds the old one or the new one

    def load(self, state: dict[str, Any]) -> None:
        was, now = json.loads(state["config"]), json.loads(self.reformer.config.to_json())
        was["reversible"] = now["reversible"]  # which changes no weight
        if changed := [f"{name} {was[name]} and not {now[name]}" for name in was if was[name] != now[name]]:
            sys.exit(f"--resume: the model of the checkpoint has {', '.join(changed)}")
        if state["digest"] != self.text.digest:
            sys.exit("--resume: the text is not the one of the checkpoint; its files were changed, or others are given")
        if state["step"] > self.options.steps:
            sys.exit(f"--steps must be at least {state['step']}, which are done, got {self.options.steps}")
        set_state_dict(
            self.model, self.optimiser, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
            options=WHOLE,
        )  # fmt: skip
        self.step, self.seconds = state["step"], state["seconds"]


# ---- the log, and what is made of it


def begin_log(file: Path, step: int) -> TextIO:
    """A CSV file that goes on behind the step of a checkpoint, for lines that are written at once."""
    kept = [row["text"] for row in read_log(file) if row["step"] <= step] if step and file.exists() else []
    beside = file.with_suffix(".tmp")
    with beside.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
    beside.replace(file)
    return file.open("a", newline="", buffering=1)


def read_log(file: Path) -> list[dict[str, Any]]:
    """The steps of a log: their numbers, and as "text" what stands there."""
    rows: list[dict[str, Any]] = []
    with file.open(newline="") as f:
        for text in csv.DictReader(f):
            if None in text.values() or None in text:  # a process was stopped within a line
                break
            numbers: dict[str, Any] = {name: float(value) if value else None for name, value in text.items()}
            rows.append({**numbers, "text": text})
    return rows


def plot(log: Path, file: Path, unit: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_log(log)
    held_out = [row for row in rows if row["validation_loss"] is not None]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], lw=0.8, color="#9ecae1", label="training")
    axes.plot(
        [row["step"] for row in held_out], [row["validation_loss"] for row in held_out],
        "o-", ms=4, color="#08519c", label="held out",
    )  # fmt: skip
    axes.set(xlabel="step", ylabel=f"loss, nats per {unit}", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def sample(model: rk.ReformerLM, text: Text, options: argparse.Namespace) -> str:
    """The beginning of the held-out text, and how the model goes on."""
    prompt = text.held_out[: min(options.context, 200)].long()[None]
    generator = torch.Generator().manual_seed(options.seed)
    chosen: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "max_new_tokens": options.sample}
    stream = model.stream(prompt, generator=generator, **chosen)
    tokens = [*tqdm(stream, total=options.sample, desc="writing", unit="token", mininterval=0.5)]
    return f"{text.decode(prompt[0])}\n\n---- the model goes on ----\n\n{text.decode(torch.cat(tokens))}\n"


# ---- the command


def integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return int(text)

    return parse


def number(words: str, is_allowed: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (is_allowed(value) and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be a number {words}, got {text!r}")
        return value

    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="text, or folders (default: Python's own library)")
    add("--suffix", default=".py", help="of files that count in folders (default .py)")
    add("--tokenizer", help="name or folder of a Hugging Face tokenizer (default: a token is a byte)")
    add("--out", type=Path, help="folder of the results (default runs/lm)")
    add("--resume", type=Path, metavar="OUT", help="go on in this folder, with all options but --parallel as before")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun (default ddp)")
    add("--precision", choices=("float32", "bf16"), default="float32", help="bf16: by autocast (default float32)")
    add("--attention", nargs="+", choices=("lsh", "local", "full"), default=["local", "lsh"], help="layers, in turn")
    add("--alignment", choices=("ring", "bucket"), help="of LSH layers (default bucket)")
    add("--shift-keys", action=argparse.BooleanOptionalAction, default=True, help="of LSH layers (default yes)")
    add("--store-activations", action=argparse.BooleanOptionalAction, default=False, help="faster, but more memory")
    add("--buckets", type=integer(2), help="of a hash (default: twice as many as a window has chunks)")
    add("--feed-forward", type=integer(1), help="width of feed-forward layers (default 4 times --width)")
    for name, default, least, text in (
        ("--steps", 500, 1, "of training"), ("--batch", 2, 1, "windows a step"),
        ("--micro-batch", 1, 1, "windows at a time"), ("--context", 4096, 2, "tokens of a window"),
        ("--layers", 4, 1, "of attention"), ("--width", 128, 1, "of the model"), ("--heads", 2, 1, "of attention"),
        ("--hashes", 4, 1, "rounds of LSH layers"), ("--chunk-length", 64, 1, "of LSH and local layers"),
        ("--warm-up", 50, 0, "steps until the learning rate is reached"), ("--validate-every", 50, 1, "steps"),
        ("--validation-batches", 2, 1, "of held-out windows"), ("--save-every", 50, 1, "steps"),
        ("--sample", 300, 1, "tokens written at the end"), ("--seed", 0, 0, "of parameters, windows, rotations"),
    ):  # fmt: skip
        add(name, type=integer(least), default=default, help=f"{text} (default {default})")
    positive = number("above 0", lambda x: x > 0)
    part = number("above 0 and below 1", lambda x: 0 < x < 1)
    share = number("of at least 0 and below 1", lambda x: 0 <= x < 1)
    for name, kind, standard, text in (
        ("--learning-rate", positive, 2e-3, "after the warm-up"), ("--clip", positive, 1.0, "norm of the gradient"),
        ("--weight-decay", number("of at least 0", lambda x: x >= 0), 0.1, "of matrices"),
        ("--dropout", share, 0.0, "probability"), ("--held-out", part, 0.05, "share of the text"),
    ):  # fmt: skip
        add(name, type=kind, default=standard, help=f"{text} (default {standard:g})")
    return parser


def saved(options: argparse.Namespace) -> dict[str, Any]:
    """The options as plain data for a checkpoint, but for those that say how this process runs."""
    values = {name: value for name, value in vars(options).items() if name not in ("out", "resume", "parallel")}
    if options.tokenizer and Path(options.tokenizer).is_dir():
        values["tokenizer"] = str(Path(options.tokenizer).resolve())
    return {**values, "files": [str(path.resolve()) for path in options.files]}


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The options, and the state of the checkpoint to go on with."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    state: dict[str, Any] | None = None
    if options.resume is not None:
        file = options.resume / "checkpoint.pt"
        if not file.is_file():
            parser.error(f"--resume: there is no {str(file)!r}")
        state = torch.load(file, map_location="cpu", weights_only=True)
        assert state is not None
        parser.set_defaults(**{**state["options"], "files": [Path(path) for path in state["options"]["files"]]})
        options = parser.parse_args(arguments)
        if options.out is not None:
            parser.error(f"--out must not be given with --resume, whose folder it is, got {str(options.out)!r}")
        options.out = options.resume
    else:
        options.out = Path("runs/lm") if options.out is None else options.out
        options.files = options.files or [Path(sysconfig.get_paths()["stdlib"])]
        if (options.out / "checkpoint.pt").exists():
            parser.error(f"--out: {str(options.out)!r} has a checkpoint; --resume it, or name another folder")
    if options.width % (2 * options.heads):  # rotary positions turn pairs
        parser.error(f"--width must be a multiple of twice --heads {options.heads}, got {options.width}")
    if options.buckets is not None and options.buckets % 2:
        parser.error(f"--buckets must be even, got {options.buckets}")
    return options, state


def main(arguments: Sequence[str] | None = None) -> None:
    options, state = parse(arguments)
    processes = Processes(options.parallel)
    text = Text(options)
    training = Training(options, text, processes)
    out: Path = options.out
    if state is not None:
        training.load(state)
        del state
    first, log = processes.rank == 0, None
    if first:
        out.mkdir(parents=True, exist_ok=True)
        log = begin_log(out / "log.csv", training.step)
        parameters = sum(p.numel() for p in training.reformer.parameters())
        print(f"{parameters:,} parameters; {len(text.train):,} tokens, and {len(text.held_out):,} held out")
    per_step = options.batch * options.context
    with tqdm(
        total=(options.steps - training.step) * per_step, desc="training", unit="token", unit_scale=True,
        mininterval=0.5, disable=not first,
    ) as bar:  # fmt: skip
        validation = math.nan
        for row in training.steps():
            if log is not None:
                csv.DictWriter(log, COLUMNS).writerow(row)
            validation = row["validation_loss"] or validation
            bar.set_postfix(step=row["step"], loss=f"{row['loss']:.3f}", held_out=f"{validation:.3f}", refresh=False)
            bar.update(per_step)
            if row["step"] % options.save_every == 0 or row["step"] == options.steps:
                training.save(out / "checkpoint.pt")
    if first or processes.sharded:  # shards are gathered by all
        training.reformer.save_pretrained(out / "model")
    processes.close()
    if log is not None:
        log.close()
        validated = [row["validation_loss"] for row in read_log(out / "log.csv") if row["validation_loss"] is not None]
        plot(out / "log.csv", out / "loss.png", "byte" if text.tokenizer is None else "token")
        written = sample(rk.ReformerLM.from_pretrained(out / "model"), text, options)
        (out / "sample.txt").write_text(written)
        print(f"\n{written}\nheld out: {validated[-1]:.4f} nats a token. {out} has the log, its plot, and the model.")


if __name__ == "__main__":
    main()
