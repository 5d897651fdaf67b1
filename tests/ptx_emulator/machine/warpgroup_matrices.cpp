// wgmma: a warp's quarter of a 64 x N x K product whose operands lie in shared memory, executed when it is issued.
#include <cstring>
#include <memory>
#include <string>

#include "access.h"
#include "fragments.h"
#include "registry.h"

namespace emulation {
namespace {

constexpr int kRows = 16;  // of the 64, for each of 4 warps
constexpr int kMaxColumns = 256;
constexpr int kMaxDepth = 16;  // K of 32-byte rows

// A matrix descriptor: where element (row, k) of an operand lies in shared memory.
class Descriptor {
 public:
  // `transposed`: k varies slowest in memory, in place of the row.
  Descriptor(uint64_t bits, int element_bytes, bool transposed)
      : start_((bits & 0x3fff) << 4),
        leading_((bits >> 16 & 0x3fff) << 4),
        stride_((bits >> 32 & 0x3fff) << 4),
        swizzle_(static_cast<int>(bits >> 62)),
        element_bytes_(element_bytes),
        transposed_(transposed) {
    if ((bits >> 49 & 7) != 0) throw Fault("not emulated", "a wgmma descriptor with a base offset");
    if (transposed && swizzle_ == 0) throw Fault("not emulated", "a transposed wgmma operand without swizzle");
  }

  uint32_t address(int row, int k) const {
    const int pitch = swizzle_ == 0 ? 16 : 256 >> swizzle_;  // bytes of a row: 128, 64, 32 with swizzle 1, 2, 3
    const uint32_t unswizzled = transposed_ ? along_rows(row, k, pitch) : along_k(row, k, pitch);
    const uint32_t swizzle_mask = swizzle_ == 0 ? 0 : (8 >> (swizzle_ - 1)) - 1;
    return unswizzled ^ ((unswizzled >> 7 & swizzle_mask) << 4);
  }

 private:
  // 8 rows make a block; blocks are `stride` apart, and without swizzle 16-byte columns are `leading` apart.
  uint32_t along_k(int row, int k, int pitch) const {
    const uint32_t in_row = k * element_bytes_;
    const uint32_t block = start_ + row / 8 * stride_ + row % 8 * pitch;
    return swizzle_ == 0 ? block + in_row / 16 * leading_ + in_row % 16 : block + in_row;
  }
  uint32_t along_rows(int row, int k, int pitch) const {
    const int per_pitch = pitch / element_bytes_;
    return start_ + row / per_pitch * leading_ + k / 8 * stride_ + k % 8 * pitch + row % per_pitch * element_bytes_;
  }

  uint32_t start_, leading_, stride_;
  int swizzle_, element_bytes_;
  bool transposed_;
};

template <class T>
float shared_element(Context& c, uint32_t address) {
  uint32_t bits = 0;
  std::memcpy(&bits, c.machine.shared.load(address, kElementBytes<T>, c.warp.thread(0)), kElementBytes<T>);
  return operand_element<T>(bits, 0);
}

uint64_t common_value(Context& c, int source) {
  const uint64_t first = c.source_bits(source, 0);
  for (int lane = 1; lane < kLanes; ++lane) {
    if (c.source_bits(source, lane) != first) {
      throw Fault("bad operand", "a wgmma descriptor differs between lanes", c.warp.thread(lane));
    }
  }
  return first;
}

struct Product {
  float a[kRows][kMaxDepth];
  float b[kMaxDepth][kMaxColumns];
  float d[kRows][kMaxColumns];
};

// d = a b, plus d where the scale is not 0. Sources: a (4 registers, or a descriptor), the descriptor of b, the scale,
// d. Immediates: N, whether a is in registers, whether a and b are transposed.
template <class T>
void multiply(Context& c) {
  constexpr int kDepth = 32 / kElementBytes<T>, kPerRegister = 4 / kElementBytes<T>;
  const int columns = static_cast<int>(c.immediate(0));
  const bool a_in_registers = c.immediate(1) != 0;
  const int after_a = a_in_registers ? 4 : 1, results = columns / 2;
  const auto product = std::make_unique<Product>();
  if (a_in_registers) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        for (int part = 0; part < kPerRegister; ++part) {
          const Position at = position_a<T>(lane, i, part);
          product->a[at.row][at.column] = operand_element<T>(c.source<uint32_t>(i)[lane], part);
        }
      }
    }
  } else {
    const Descriptor a(common_value(c, 0), kElementBytes<T>, c.immediate(2) != 0);
    const int first_row = c.warp.id % 4 * kRows;
    for (int row = 0; row < kRows; ++row) {
      for (int k = 0; k < kDepth; ++k) product->a[row][k] = shared_element<T>(c, a.address(first_row + row, k));
    }
  }
  const Descriptor b(common_value(c, after_a), kElementBytes<T>, c.immediate(3) != 0);
  for (int column = 0; column < columns; ++column) {
    for (int k = 0; k < kDepth; ++k) product->b[k][column] = shared_element<T>(c, b.address(column, k));
  }
  const bool accumulate = (c.source_bits(after_a + 1, 0) & 1) != 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < results; ++i) {
      const Position at = position_d(lane, i);
      product->d[at.row][at.column] = accumulate ? c.source<float>(after_a + 2 + i)[lane] : 0.0f;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < columns; ++n) product->d[row][n] += product->a[row][k] * product->b[k][n];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < results; ++i) {
      const Position at = position_d(lane, i);
      c.destination<float>(i).set(lane, product->d[at.row][at.column]);
    }
  }
  ++c.machine.counters.mma;
}

}  // namespace

void add_warpgroup_matrices(Registry& r) {
  r.add("wgmma.f16", multiply<Half>, Control::whole_warp);
  r.add("wgmma.bf16", multiply<BFloat16>, Control::whole_warp);
  r.add("wgmma.tf32", multiply<Tf32>, Control::whole_warp);
}

}  // namespace emulation
