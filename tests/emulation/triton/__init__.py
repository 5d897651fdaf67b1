"""The Triton kernels, compiled by Triton and executed from its PTX."""
