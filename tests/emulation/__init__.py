"""GPU kernels run on a CPU: their compiled PTX in an interpreter, their source on the host."""
