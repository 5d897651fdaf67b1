"""reformer_kernels: fused LSH attention, local attention and reversible layers for PyTorch."""

from . import _requires  # noqa: F401  (first)
from ._dispatch import explain, use_backend
from .clustered import clustered_attention
from .functional import bucket_order, hash_buckets, local_attention, lsh_attention
from .hashing import random_rotations
from .models.config import ReformerConfig
from .models.heads import ReformerQuestionAnswering, ReformerSequenceClassifier
from .models.lm import ReformerLM, ReformerMaskedLM
from .models.reformer import Reformer
from .models.seq2seq import ReformerSeq2Seq
from .modules.attention import LocalSelfAttention, LSHSelfAttention
from .modules.convert import convert_attention
from .modules.feed_forward import ChunkedFeedForward, TokenChunks, chunked_cross_entropy
from .modules.full_attention import FullAttention
from .modules.multihead import LSHMultiheadAttention
from .modules.position import (
    AxialPositionEmbedding,
    LearnedPositionEmbedding,
    RotaryPositionEmbedding,
    SinusoidalPositionEmbedding,
)
from .modules.reversible import ReversibleBlock, ReversibleSequence
from .rules import AttentionRules
from .sdpa import scaled_dot_product_attention

__version__ = "0.1.0"

__all__ = [
    "AttentionRules",
    "AxialPositionEmbedding",
    "ChunkedFeedForward",
    "FullAttention",
    "LSHMultiheadAttention",
    "LSHSelfAttention",
    "LearnedPositionEmbedding",
    "LocalSelfAttention",
    "Reformer",
    "ReformerConfig",
    "ReformerLM",
    "ReformerMaskedLM",
    "ReformerQuestionAnswering",
    "ReformerSeq2Seq",
    "ReformerSequenceClassifier",
    "ReversibleBlock",
    "ReversibleSequence",
    "RotaryPositionEmbedding",
    "SinusoidalPositionEmbedding",
    "TokenChunks",
    "bucket_order",
    "chunked_cross_entropy",
    "clustered_attention",
    "convert_attention",
    "explain",
    "hash_buckets",
    "local_attention",
    "lsh_attention",
    "random_rotations",
    "scaled_dot_product_attention",
    "use_backend",
]
