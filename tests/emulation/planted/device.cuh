// What the planted kernels need, in bfloat16.
#pragma once
#include "kernels/cuda/device.cuh"

#ifndef BUG
#define BUG 0
#endif
constexpr int kBug = BUG;  // which mistake is planted; 0: none

using namespace rk::cuda;
