"""The CUDA kernels, compiled for a CPU by g++, where threads are fibers."""
