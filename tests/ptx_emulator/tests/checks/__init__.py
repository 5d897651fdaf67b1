"""What the emulator must compute and report, on hand-written PTX: each check takes the machine to check."""

from . import arithmetic, bits, collectives, conversions, faults, matrices

ALL = [
    function
    for module in (arithmetic, bits, collectives, conversions, faults, matrices)
    for name, function in vars(module).items()
    if name.startswith("check_")
]
