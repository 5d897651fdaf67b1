// Registers the CUDA kernels as torch ops, through torch's stable ABI only.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

#include "kernels/cuda/probe.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kVectorBytes = 16;

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes == 0;
}

// input [N, n], index int32 [M], out [M, n]: out[i] = input[index[i]]; an index outside the input gives a row of zeros.
void gather_rows(Tensor input, Tensor index, Tensor out) {
  STD_TORCH_CHECK(input.dim() == 2 && input.is_contiguous() && is_aligned(input), "gather_rows: input has ",
                  input.dim(), " dimensions; it must have 2, be contiguous and aligned to 16 bytes");
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && is_aligned(out), "gather_rows: out has ", out.dim(),
                  " dimensions; it must have 2, be contiguous and aligned to 16 bytes");
  STD_TORCH_CHECK(index.dim() == 1 && index.is_contiguous() && index.scalar_type() == ScalarType::Int,
                  "gather_rows: index has ", index.dim(), " dimensions and scalar type ", int(index.scalar_type()),
                  "; it must be contiguous int32 (", int(ScalarType::Int), ") of 1 dimension");
  STD_TORCH_CHECK(out.scalar_type() == input.scalar_type(), "gather_rows: out has scalar type ", int(out.scalar_type()),
                  "; it must have input's, ", int(input.scalar_type()));
  STD_TORCH_CHECK(out.size(0) == index.size(0) && out.size(1) == input.size(1), "gather_rows: out has shape [",
                  out.size(0), ", ", out.size(1), "]; it must be [", index.size(0), ", ", input.size(1), "]");
  const int device = input.get_device_index();
  STD_TORCH_CHECK(input.is_cuda() && index.is_cuda() && out.is_cuda() && index.get_device_index() == device &&
                      out.get_device_index() == device,
                  "gather_rows: input, index and out must be on one CUDA device, got indices ", device, ", ",
                  index.get_device_index(), " and ", out.get_device_index(), " (-1 is the CPU)");
  const int64_t row_bytes = input.size(1) * static_cast<int64_t>(input.element_size());
  STD_TORCH_CHECK(row_bytes % kVectorBytes == 0, "gather_rows: input has rows of ", row_bytes,
                  " bytes; they must be a multiple of ", kVectorBytes);

  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = reformer_kernels::cuda::gather_rows({.input = input.const_data_ptr(),
                                                         .index = index.const_data_ptr<int32_t>(),
                                                         .out = out.mutable_data_ptr(),
                                                         .input_rows = input.size(0),
                                                         .rows = index.size(0),
                                                         .vectors = row_bytes / kVectorBytes},
                                                        stream);
  STD_TORCH_CHECK(error == 0, "gather_rows: the launch failed: ", reformer_kernels::cuda::error_string(error));
}

std::string build_info() {
  return "{\"torch\": \"" RK_BUILD_TORCH "\", \"cuda\": \"" RK_BUILD_CUDA
         "\", \"architectures\": \"" RK_CUDA_ARCHITECTURES "\"}";
}

}  // namespace

STABLE_TORCH_LIBRARY(reformer_kernels_cuda, m) {
  m.def("gather_rows(Tensor input, Tensor index, Tensor(a!) out) -> ()");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(reformer_kernels_cuda, CUDA, m) { m.impl("gather_rows", TORCH_BOX(&gather_rows)); }

// Without a tensor argument there is no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(reformer_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
