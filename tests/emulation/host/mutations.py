"""Ways in which the kernels could be wrong that a sanitizer must report: the problem of each is a sanitizer's name."""

from __future__ import annotations

from ..mutation import Mutation

INSIDE = "const bool inside = token < p.L && d < p.D;\n      "
ONE_MORE = INSIDE.replace("token <", "token <=")
MUTATIONS = [
    Mutation("hash.cuh", "a row too many is copied", "address", "heap-buffer-overflow",
             f"{INSIDE}copy_async(", f"{ONE_MORE}copy_async("),
    Mutation("hash.cuh", "a row too many is read", "address", "heap-buffer-overflow",
             f"{INSIDE}reinterpret_cast", f"{ONE_MORE}reinterpret_cast"),
    Mutation("order.cuh", "counters are used before they are complete", "thread", "data race",
             "__syncthreads();\n\n  int32_t* of_tile", "int32_t* of_tile"),
    Mutation("select.cuh", "members are read before they are written", "thread", "data race",
             "__syncwarp();  // all members are written", ""),
    Mutation("attention.cuh", "columns beyond the row are written", "address", "overflow",
             "const bool mine = write && d < width;", "const bool mine = write;"),
]  # fmt: skip

# No mistake: kernels that have little room for weights, which otherwise takes hundreds of MB of them.
LITTLE_ROOM = Mutation(
    "plan.h", "little room for weights", "address", "", "kSelectTotalsBytes = 256 << 20;", "kSelectTotalsBytes = 4096;"
)
