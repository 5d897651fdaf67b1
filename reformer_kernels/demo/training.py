"""Training for a given time, held-out bits per byte, and sampling."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import ByteLM
from .text import DemoError

# Shares of the training time after which the held-out text is evaluated: closer where the curve is steep.
CHECKPOINTS = (0.1, 0.25, 0.5, 0.75)
_WARM_UP = 0.1  # share of the time


def bits_per_byte(model: ByteLM, data: Tensor, context: int) -> float:
    """Mean bits per byte over windows of ``context`` bytes; the last one is shorter."""
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(data) - 1, context):
            window = data[start : start + context + 1]
            total += float(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum"))
    model.train()
    return total / (len(data) - 1) / math.log(2)


def _learning_rate(peak: float, share: float) -> float:
    """Linear warm-up, then a cosine to zero, as functions of the share of the time that has passed."""
    # At least a tenth in the warm-up: the first step starts at share 0, and a short run may have no other.
    return peak * max(0.1, min(1.0, share / _WARM_UP)) * (0.5 + 0.5 * math.cos(math.pi * share))


def train(
    model: ByteLM,
    train_data: Tensor,
    held_out: Tensor,
    *,
    seconds: float,
    context: int,
    learning_rate: float,
    seed: int,
    bar: Any,
) -> dict[str, Any]:
    """Trains for that many seconds of wall-clock time, not counting evaluations.

    Args:
        train_data, held_out: int64 [n], bytes.
        seed: of the windows that are drawn; one window a step.
        bar: a tqdm bar with ``total=seconds``.

    Returns:
        steps, seconds, the learning rate and the curve: pairs of seconds and held-out bits per byte.

    Raises:
        DemoError: the loss is not finite any more.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    elapsed, step_seconds, steps = 0.0, 0.0, 0
    checkpoints = [share * seconds for share in CHECKPOINTS]
    curve = [(0.0, bits_per_byte(model, held_out, context))]
    # A step that would end too late is not begun: a model with slow steps must not get more than its time.
    while steps == 0 or elapsed + step_seconds <= seconds:
        begin = time.perf_counter()
        start = int(torch.randint(len(train_data) - context, (1,), generator=generator))
        window = train_data[start : start + context + 1]
        rate = _learning_rate(learning_rate, min(1.0, (elapsed + step_seconds) / seconds))
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(model(window[None, :-1])[0], window[1:])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        steps += 1
        bits = float(loss.detach()) / math.log(2)
        if not math.isfinite(bits):
            raise DemoError(f"the loss of step {steps} is {bits}: choose a learning rate below {learning_rate}")
        step_seconds = time.perf_counter() - begin
        elapsed += step_seconds
        bar.update(min(step_seconds, max(0.0, bar.total - bar.n)))
        bar.set_postfix_str(f"step {steps}, {bits:.2f} bits per byte", refresh=False)
        if checkpoints and elapsed >= checkpoints[0] and elapsed + step_seconds <= seconds:
            curve.append((elapsed, bits_per_byte(model, held_out, context)))
            checkpoints = [moment for moment in checkpoints if moment > elapsed]
    curve.append((elapsed, bits_per_byte(model, held_out, context)))
    return {"steps": steps, "seconds": elapsed, "learning_rate": learning_rate, "curve": curve}


def generate(
    model: ByteLM, prompt: Tensor, count: int, *, context: int, temperature: float, seed: int, progress: Any
) -> bytes:
    """``count`` bytes after the prompt (int64 [n]), drawn one by one."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    tokens = prompt[None]
    with torch.inference_mode():
        for _ in progress(range(count)):
            logits = model(tokens[:, -context:])[0, -1]
            token = torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator)
            tokens = torch.cat((tokens, token[None]), 1)
    model.train()
    return bytes(tokens[0, len(prompt) :].tolist())
