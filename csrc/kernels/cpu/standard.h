// What the kernels use from the standard library and from plain code. It is included before an instruction set is
// chosen, so that these inline functions are compiled for the baseline.
#pragma once
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in functions for unused lanes
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/windows.h"
