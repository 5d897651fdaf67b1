"""reformer_kernels: fused LSH attention, local attention and reversible layers for PyTorch."""

from ._dispatch import explain, use_backend
from .clustered import clustered_attention
from .functional import bucket_order, hash_buckets, local_attention, lsh_attention
from .hashing import random_rotations
from .modules.attention import LocalSelfAttention, LSHSelfAttention
from .rules import AttentionRules

__version__ = "0.1.0"

__all__ = [
    "AttentionRules",
    "LSHSelfAttention",
    "LocalSelfAttention",
    "bucket_order",
    "clustered_attention",
    "explain",
    "hash_buckets",
    "local_attention",
    "lsh_attention",
    "random_rotations",
    "use_backend",
]
