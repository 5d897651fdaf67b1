"""Trains a stock ``nn.TransformerEncoder`` on long pixel sequences, and the same model with its attention converted.

    python examples/swap_attention.py

The handwritten digits of scikit-learn, enlarged to 64 x 64 pixels, are sequences of 4,096 steps. Both models start from
the same parameters and take the same number of steps on the same batches, each in a process of its own, so that peak
memory is its own. The only difference is one line: ``rk.convert_attention(model)``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reformer_kernels as rk

MODELS = ("stock", "converted")
CLASSES = 10


class PixelClassifier(nn.Module):
    """Images [B, 1, S, S] -> logits [B, 10]; the encoder sees every pixel as a step: L = S².

    Convolutions with stride 1 tell each pixel of its surroundings, and a vector per row and column where it is.
    """

    def __init__(self, side: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 5, padding="same", dilation=3), nn.GELU(),
            nn.Conv2d(width, width, 5, padding="same", dilation=6), nn.GELU(),
        )  # fmt: skip
        self.rows = nn.Parameter(0.1 * torch.randn(width, side, 1))
        self.columns = nn.Parameter(0.1 * torch.randn(width, 1, side))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images) + self.rows + self.columns
        logits: Tensor = self.head(self.encoder(x.flatten(2).transpose(1, 2)).mean(1))  # [B, L, E] -> [B, 10]
        return logits


def digits(side: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images [N, 1, side, side] with their classes [N]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("error: the digits come from scikit-learn: pip install scikit-learn")
    images, classes = (torch.as_tensor(x) for x in load_digits(return_X_y=True))
    images = F.interpolate(images.float().view(-1, 1, 8, 8) / 8 - 1, (side, side), mode="bilinear")
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, training = shuffled[:360], shuffled[360:]
    return (images[training], classes[training]), (images[test], classes[test])


def peak_bytes() -> int:
    """The most memory that this process has had; macOS counts bytes, others kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains and tests one of MODELS, in this process."""
    if options.threads:
        torch.set_num_threads(options.threads)
    (images, classes), (test_images, test_classes) = digits(options.side)
    torch.manual_seed(options.seed)
    model = PixelClassifier(options.side, options.width, options.heads, options.layers)
    if name == "converted":
        rk.convert_attention(model, budget=options.budget)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.learning_rate, options.steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(options.seed)
    before, seconds = peak_bytes(), []
    for step in range(1, options.steps + 1):
        batch = torch.randint(len(images), (options.batch,), generator=generator)
        begin = time.perf_counter()
        loss = F.cross_entropy(model(images[batch]), classes[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seconds.append(time.perf_counter() - begin)
        schedule.step()
        if step % max(1, options.steps // 5) == 0:
            print(f"  {name}: step {step}, loss {loss.detach():.2f}", flush=True)
    extra = peak_bytes() - before
    model.eval()
    count = min(options.test_images, len(test_images))
    with torch.no_grad():
        guesses = [model(images).argmax(-1) for images in test_images[:count].split(options.batch)]
    accuracy = (torch.cat(guesses) == test_classes[:count]).float().mean()
    return {"accuracy": float(accuracy), "seconds": statistics.median(seconds), "extra_bytes": extra}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    integers = {
        "steps": (200, "training steps of each model"), "batch": (8, "images a step"), "side": (64, "L is its square"),
        "width": (32, "E"), "heads": (2, "H"), "layers": (1, "encoder layers"), "budget": (128, "keys a query attends"),
        "test_images": (200, "how many of the 360 test images to use"),
    }  # fmt: skip
    for name, (default, text) in integers.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="at its highest (default 0.005)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches (default 0)")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: torch's own choice)")
    options = parser.parse_args(arguments)
    for name in integers:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.width % options.heads:
        parser.error(f"--width must be a multiple of --heads, got {options.width} and {options.heads}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    print(f"{CLASSES} classes, sequences of {options.side**2:,} steps, {options.steps} training steps of each model")
    results = {}
    for name in MODELS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
            results[name] = fresh_process.submit(train, name, options).result()
    print(f"\n{'':<12}{'accuracy':>10}{'time a step':>14}{'extra peak memory':>20}")
    for name, row in results.items():
        seconds, megabytes = f"{row['seconds']:.3f} s", f"{row['extra_bytes'] / 2**20:,.0f} MB"
        print(f"{name:<12}{row['accuracy']:>10.1%}{seconds:>14}{megabytes:>20}")


if __name__ == "__main__":
    main()
