"""Training for a given time, held-out bits per byte, and sampling."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.lm import ReformerLM
from .text import DemoError

# Shares of the training time after which the held-out text is evaluated: closer where the curve is steep.
CHECKPOINTS = (0.1, 0.25, 0.5, 0.75)
_WARM_UP_STEPS = 20
PARTS = 20  # of the held-out text, over which a difference is said to spread
# Three seeds came to 2.50, 2.48 and 2.55 bits per byte after 450 steps with LSH attention, and to 3.28, 3.11 and 3.34
# after 170 with SDPA: a standard deviation of 0.12 for the difference of two runs, of which this is twice.
RUN_SPREAD = 0.25


def bits_of_bytes(model: ReformerLM, data: Tensor, context: int, n_hashes: int) -> Tensor:
    """Bits that each byte of ``data`` [n] but the first takes, float64 [n - 1], in windows of ``context`` bytes."""
    model.eval()
    windows = []
    with torch.inference_mode():
        for start in range(0, len(data) - 1, context):  # the last window is shorter
            window = data[start : start + context + 1]
            logits = model(window[None, :-1], n_hashes=n_hashes).logits
            windows.append(F.cross_entropy(logits[0], window[1:], reduction="none").double())
    model.train()
    return torch.cat(windows) / math.log(2)


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean of ``a - b``, the bits of the same bytes [n] by two models, and its spread.

    The spread is two standard deviations of what other text of this kind would do, seen over ``PARTS`` equal parts of
    this one, and of what other runs of the training would do, ``RUN_SPREAD``: a mean within it says nothing.
    """
    parts = torch.stack([part.mean() for part in (a - b).tensor_split(min(PARTS, len(a)))])
    of_text = 2 * float(parts.std()) / math.sqrt(len(parts)) if len(parts) > 1 else math.inf
    return float((a - b).mean()), math.hypot(of_text, RUN_SPREAD)


class Run:
    """The training of one model: AdamW on one window a step, for ``seconds`` of wall-clock time without evaluations.

    The learning rate warms up over the first steps and then falls to zero by a cosine of the share of the time.

    Args:
        train_data, held_out: int64 [n], bytes.
        context: bytes in a window.
        learning_rate: the highest one.
        eval_hashes: hash rounds of LSH layers in evaluation: few are enough in training, more see more there.
        seed: of the windows that are drawn.

    Attributes:
        steps, elapsed: how far the training is.
        curve: pairs of seconds and bits per byte of the held-out text.
        held_out_bits: float64 [n - 1], of each of its bytes when it was last evaluated.
    """

    def __init__(
        self, model: ReformerLM, train_data: Tensor, held_out: Tensor, *,
        seconds: float, context: int, learning_rate: float, eval_hashes: int, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.train_data, self.held_out = model, train_data, held_out
        self.seconds, self.context, self.learning_rate = seconds, context, learning_rate
        self.eval_hashes = eval_hashes
        self.generator = torch.Generator().manual_seed(seed)
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
        self.checkpoints = [share * seconds for share in CHECKPOINTS]
        self.steps, self.elapsed, self.bits = 0, 0.0, math.nan
        self.curve: list[tuple[float, float]] = []

    def evaluate(self) -> None:
        """Adds a point to the curve."""
        self.held_out_bits = bits_of_bytes(self.model, self.held_out, self.context, self.eval_hashes)
        self.curve.append((self.elapsed, float(self.held_out_bits.mean())))

    def is_over(self) -> bool:
        """No step is left that would end in time."""
        # A step that would end too late is not begun: a model with slow steps must not get more than its time.
        return self.steps > 0 and self.elapsed + self.elapsed / self.steps > self.seconds

    def step(self) -> None:
        """One step; an evaluation before the first, after the last, and after those that reach a checkpoint.

        Raises:
            DemoError: the loss is not finite any more.
        """
        if not self.curve:
            self.evaluate()
        begin = time.perf_counter()
        # Steps, not time, count in the warm-up, or a pause of a busy machine would leap over it.
        warm_up = min(1.0, (self.steps + 1) / _WARM_UP_STEPS)
        share = min(1.0, self.elapsed / self.seconds)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * warm_up * (0.5 + 0.5 * math.cos(math.pi * share))
        start = int(torch.randint(len(self.train_data) - self.context, (1,), generator=self.generator))
        window = self.train_data[None, start : start + self.context]
        loss = self.model(window, labels=window).loss
        assert loss is not None
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.bits = float(loss.detach()) / math.log(2)
        self.steps += 1
        self.elapsed += time.perf_counter() - begin
        if not math.isfinite(self.bits):
            raise DemoError(f"the loss of step {self.steps} is {self.bits}: lower the rate {self.learning_rate}")
        due = [moment for moment in self.checkpoints if moment <= self.elapsed]
        if due or self.is_over():
            del self.checkpoints[: len(due)]
            self.evaluate()


def train_together(runs: dict[str, Run], bar: Any) -> None:
    """Trains the models in turn, the one with less time behind it first, until the time of each is over.

    So both meet the same machine: whatever else slows it for a while slows both.

    Args:
        bar: a tqdm bar whose total is the sum of the runs' seconds.
    """
    while waiting := [run for run in runs.values() if not run.is_over()]:
        min(waiting, key=lambda run: run.elapsed).step()
        bar.n = min(bar.total, sum(run.elapsed for run in runs.values()))
        bits = ", ".join(f"{name} {run.bits:.2f}" for name, run in runs.items())
        bar.set_postfix_str(f"bits per byte: {bits}", refresh=False)
        bar.update(0)


def generate(model: ReformerLM, prompt: Tensor, count: int, *, temperature: float, seed: int, progress: Any) -> bytes:
    """``count`` bytes after the prompt (int64 [n]), drawn one by one, by the model's cache."""
    tokens = model.stream(
        prompt[None], max_new_tokens=count, do_sample=True, temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return bytes(int(token) for token in progress(tokens, total=count))
