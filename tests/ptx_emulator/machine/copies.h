// Asynchronous copies into shared memory: when they land.
#pragma once
#include "context.h"

namespace emulation {

// Whether a thread has copies that it has not waited for.
bool copies_in_flight(const Warp& warp, int lane);

}  // namespace emulation
