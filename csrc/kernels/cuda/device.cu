// What the runtime says of the device, and its errors in words.
#include <cuda_runtime.h>

#include "kernels/cuda/kernels.h"

namespace rk::cuda {

int current_device(Device& device) {
  int number = 0;
  cudaError_t error = cudaGetDevice(&number);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, number);
  };
  read(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(device.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(device.shared_bytes_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return error;
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace rk::cuda
