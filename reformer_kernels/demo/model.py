"""The two language models of the demo as configurations: with LSH attention, and with torch's SDPA."""

from __future__ import annotations

from dataclasses import replace

from ..models.config import ReformerConfig

_BUCKET_TOKENS = 64  # in the mean: a chunk


def make_configs(context: int, width: int, layers: int, heads: int, hashes: int) -> dict[str, ReformerConfig]:
    """The configurations of a ``ReformerLM`` over bytes, by name; they have about the same number of parameters.

    Args:
        context: bytes in a window of the training.
        width, layers, heads: E, the number of layers, and H.
        hashes: hash rounds of the LSH layers in training and generation.
    """
    # At this size all activations fit into memory, and storing them is faster than computing them again.
    # Held-out bits per byte after 300 steps with LSH attention, at a rate of 0.006: 2.91 with rotary positions, 3.46
    # with learned and 3.48 with axial ones, and 3.07 with the mean of the streams, all with initial weights of 0.02; of
    # 0.05 and 0.1 they are 2.72.
    sdpa = ReformerConfig(
        vocab_size=256, embed_dim=width, num_layers=layers, num_heads=heads, attention=("full",),
        feed_forward_dim=4 * width, position="rotary", initializer_range=0.05,
        reversible=False, feed_forward_chunk_length=None, head_chunk_length=None,
    )  # fmt: skip
    # Buckets that are cut into chunks one by one are strictly causal: in the ring of the published models, later
    # tokens move the borders of the chunks, from which bits per byte could profit.
    lsh = replace(
        sdpa, attention=("local", "lsh"), n_hashes=hashes, alignment="bucket",
        n_buckets=2 * max(1, context // (2 * _BUCKET_TOKENS)),
    )  # fmt: skip
    # LSH layers project queries and keys as one. The feed-forward layers get the weights that this saves, 2 E + 1 for
    # each unit, so that the models are equal to half a unit a layer.
    saved = lsh.layers.count("lsh") * width**2
    return {
        "lsh": replace(lsh, feed_forward_dim=4 * width + round(saved / (layers * (2 * width + 1)))),
        "sdpa": sdpa,
    }
