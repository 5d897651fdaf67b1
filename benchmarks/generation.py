"""``python -m benchmarks.generation``: the cost of a token behind long contexts, and the bytes of its cache.

Models of one width, depth and number of heads, untrained: local and LSH layers in turn with our cache, Hugging Face's
Reformer with its own, and a Llama, whose full attention reads all keys and values. A text of random bytes, batch 1.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels.hashing import bucket_factors

from .machine import environment
from .report import file_to_write, length_name, megabytes, number, table
from .timing import interleaved

Row = dict[str, Any]
VOCAB_SIZE = 256
CONTEXTS = (1024, 16384, 65536)
TOKENS = 16  # of a run; the cache grows by them
NewTokens = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Width:
    embed_dim: int = 256
    layers: int = 6
    heads: int = 4
    feed_forward_dim: int = 1024
    n_hashes: int = 4
    chunk_length: int = 64
    n_buckets: int = 64  # of ours, whatever the context


def ours(width: Width, context: Tensor) -> tuple[NewTokens, Callable[[], int]]:
    model = rk.ReformerLM(
        rk.ReformerConfig(
            vocab_size=VOCAB_SIZE, embed_dim=width.embed_dim, num_layers=width.layers, num_heads=width.heads,
            feed_forward_dim=width.feed_forward_dim, n_hashes=width.n_hashes, lsh_chunk_length=width.chunk_length,
            local_chunk_length=width.chunk_length, n_buckets=width.n_buckets, alignment="bucket", position="rotary",
        )
    ).eval()  # fmt: skip
    cache = model.new_cache()
    model.reformer(context, cache=cache)
    return lambda token: model(token, cache=cache).logits, lambda: cache.nbytes


def huggingface(width: Width, context: Tensor) -> tuple[NewTokens, Callable[[], int]]:
    from transformers import ReformerConfig, ReformerModelWithLMHead

    length = context.shape[1]
    factors = bucket_factors(None, length, width.chunk_length)
    model = ReformerModelWithLMHead(
        ReformerConfig(
            vocab_size=VOCAB_SIZE, hidden_size=width.embed_dim, attn_layers=["local", "lsh"] * (width.layers // 2),
            num_attention_heads=width.heads, attention_head_size=width.embed_dim // width.heads,
            num_hashes=width.n_hashes, num_buckets=factors[0] if len(factors) == 1 else list(factors),
            lsh_attn_chunk_length=width.chunk_length, local_attn_chunk_length=width.chunk_length,
            axial_pos_shape=[256, 2 * length // 256],
            axial_pos_embds_dim=[width.embed_dim // 4, 3 * width.embed_dim // 4], max_position_embeddings=2 * length,
            feed_forward_size=width.feed_forward_dim, is_decoder=True, hidden_act="gelu", use_cache=True,
        )
    ).eval()  # fmt: skip
    cache = model.reformer(context, use_cache=True).past_buckets_states

    def step(token: Tensor) -> Tensor:
        logits: Tensor = model(token, past_buckets_states=cache, use_cache=True).logits
        return logits

    return step, lambda: nbytes([*cache.states_cache, *cache.buckets_cache])


def llama(width: Width, context: Tensor) -> tuple[NewTokens, Callable[[], int]]:
    """Its cache is filled with random keys and values, as what they are does not matter to the time."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=width.embed_dim, num_hidden_layers=width.layers,
            num_attention_heads=width.heads, intermediate_size=width.feed_forward_dim,
            max_position_embeddings=2 * context.shape[1],
        )
    ).eval()  # fmt: skip
    cache: Any = DynamicCache(config=model.config)
    shape = (1, width.heads, context.shape[1], width.embed_dim // width.heads)
    for layer in range(width.layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)

    # Newer versions of transformers have another name for it.
    name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

    def step(token: Tensor) -> Tensor:
        logits: Tensor = model(token, use_cache=True, **{name: cache}).logits
        return logits

    return step, lambda: nbytes([x for layer in cache.layers for x in (layer.keys, layer.values)])


MODELS = {"ours, local + LSH": ours, "Hugging Face's Reformer": huggingface, "Llama, full attention": llama}


def nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


@torch.no_grad()
def measure(name: str, width: Width, length: int) -> tuple[Callable[[], dict[str, float]], Callable[[], int]]:
    """A timer of a token behind a context, the mean of TOKENS of them; and the bytes of the cache."""
    torch.manual_seed(0)
    step, size = MODELS[name](width, torch.randint(VOCAB_SIZE, (1, length)))

    @torch.no_grad()
    def run() -> dict[str, float]:
        token = torch.zeros(1, 1, dtype=torch.int64)
        start = time.perf_counter()
        for _ in range(TOKENS):
            token = step(token)[:, -1:].argmax(-1)
        return {"token": (time.perf_counter() - start) / TOKENS}

    return run, size


def run(options: argparse.Namespace) -> Row:
    env = environment()
    print(", ".join(f"{key} {value}" for key, value in env.items()), flush=True)
    width, rows = Width(), []
    for length in options.contexts:
        timers, sizes = {}, {}
        for name in MODELS:
            print(f"reading {length:,} tokens: {name}", flush=True)
            timers[name], sizes[name] = measure(name, width, length)
        cache_bytes = {name: size() for name, size in sizes.items()}
        for name, times in interleaved(timers, options.repeats).items():
            rows.append({"model": name, "context": length, "cache_bytes": cache_bytes[name], "seconds": times})
    return {"environment": env, "width": asdict(width), "generation": rows}


def markdown(results: Row) -> str:
    """Tokens a second and the size of the cache, by model and context."""
    rows = results["generation"]
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    body = []
    for name in MODELS:
        found = {row["context"]: row for row in rows if row["model"] == name}
        rates = {length: 1 / row["seconds"]["token"] for length, row in found.items()}
        body.append([name, *(f"{number(rates[n])}/s, {megabytes(found[n]['cache_bytes'])}" for n in contexts)])
    return table(["tokens a second, and the cache", *map(length_name, contexts)], body)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=list(CONTEXTS), help="their lengths, multiples of 256"
    )
    parser.add_argument(
        "--repeats", type=int, default=9, help=f"runs of {TOKENS} tokens; the median counts (default 9)"
    )
    parser.add_argument("--out", type=file_to_write, help="JSON file for the results; its folder must exist")
    options = parser.parse_args(arguments)
    for length in options.contexts:
        if length < 256 or length % 256:
            parser.error(f"--contexts must be positive multiples of 256, got {length}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    results = run(options)
    print("\n" + markdown(results))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
