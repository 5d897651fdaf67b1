// Launches on the host: the blocks of a grid run one after another, or the launch is only recorded.
#pragma once
#include <cstddef>
#include <functional>

#include "kernels/cuda/launch.h"
#include "settings.h"

namespace rk::host {

// `body` calls the kernel. Returns a cudaError_t, or throws a KernelError.
int launch(const void* kernel, const cuda::Launch& shape, const void* params, size_t params_bytes,
           const std::function<void()>& body);

}  // namespace rk::host
