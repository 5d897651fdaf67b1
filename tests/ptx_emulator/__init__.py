"""An interpreter of PTX: kernels for a GPU run on a CPU, with their memory accesses checked and counted."""

from .kernel import SCHEDULES, Counters, EmulationError, Kernel, Schedule, VirtualRegion

__all__ = ["SCHEDULES", "Counters", "EmulationError", "Kernel", "Schedule", "VirtualRegion"]
