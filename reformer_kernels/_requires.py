"""Refuses a torch that is too old, before anything fails in a way that does not say so."""

import torch

LEAST_TORCH = (2, 11)  # torch.library, and the stable ABI that the libraries are built for


def check_torch(version: str) -> None:
    """Raises ImportError for a torch older than LEAST_TORCH; its pre-releases ("2.11.0a0+git1234") are not older."""
    release = tuple(int(part) for part in version.split(".")[:2])
    if release < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        raise ImportError(f"reformer_kernels needs torch {least} or newer, and torch {version} is installed")


check_torch(torch.__version__)
