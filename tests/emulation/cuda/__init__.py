"""The CUDA kernels, executed from nvcc's PTX."""
