"""Measurements: ``python -m benchmarks.run`` (cases, providers, kernels) and the check of a GPU machine."""
