"""``python -m reformer_kernels.demo``: LSH attention against torch SDPA, one layer and a language model."""
