"""reformer_kernels: fused LSH attention, local attention and reversible layers for PyTorch."""

from ._dispatch import explain, use_backend
from .clustered import clustered_attention
from .functional import bucket_order, hash_buckets, local_attention, lsh_attention
from .hashing import random_rotations
from .modules.attention import LocalSelfAttention, LSHSelfAttention
from .modules.convert import convert_attention
from .modules.multihead import LSHMultiheadAttention
from .rules import AttentionRules
from .sdpa import scaled_dot_product_attention

__version__ = "0.1.0"

__all__ = [
    "AttentionRules",
    "LSHMultiheadAttention",
    "LSHSelfAttention",
    "LocalSelfAttention",
    "bucket_order",
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
