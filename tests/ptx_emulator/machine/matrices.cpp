// ldmatrix, stmatrix and mma.sync: matrices spread over the lanes of a warp.
#include <cstring>

#include "access.h"
#include "fragments.h"
#include "registry.h"

namespace emulation {
namespace {

constexpr int kRowBytes = 16;

// Matrix i is rows of 16 bytes at the addresses that lanes 8 i to 8 i + 7 give.
struct Rows {
  uint64_t addresses[kLanes];
  uint32_t lanes;

  Rows(const Context& c, int address_source, size_t matrices) : lanes(kAllLanes >> (kLanes - 8 * matrices)) {
    each_lane_in_order(lanes, [&](int lane) {
      addresses[lane] = static_cast<uint32_t>(c.source_bits(address_source, lane) + c.immediate(0));
    });
  }
};

// Which elements of a matrix a lane holds: two neighbours of a row, or of a column.
struct Element {
  int row, column;
};
template <bool Transposed>
Element element(int lane, int half) {
  const int outer = lane / 4, inner = lane % 4 * 2 + half;
  return Transposed ? Element{inner, outer} : Element{outer, inner};
}

// Source 0: the address. Destination i: matrix i.
template <bool Transposed>
void load_matrices(Context& c) {
  const size_t matrices = c.instruction.destinations.size();
  const Rows rows(c, 0, matrices);
  const std::byte* data[kLanes];
  each_lane_in_order(rows.lanes, [&](int lane) {
    data[lane] = c.machine.shared.load(static_cast<uint32_t>(rows.addresses[lane]), kRowBytes, c.warp.thread(lane));
  });
  for (size_t i = 0; i < matrices; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) {
      uint16_t halves[2];
      for (int half = 0; half < 2; ++half) {
        const Element at = element<Transposed>(lane, half);
        std::memcpy(&halves[half], data[8 * i + at.row] + 2 * at.column, 2);
      }
      c.destination<uint32_t>(i).set(lane, static_cast<uint32_t>(halves[1]) << 16 | halves[0]);
    }
  }
  c.machine.counters.count_shared(rows.addresses, rows.lanes, kRowBytes);
}

// Sources: the address, then the matrices.
template <bool Transposed>
void store_matrices(Context& c) {
  const size_t matrices = c.instruction.sources.size() - 1;
  const Rows rows(c, 0, matrices);
  for (size_t i = 0; i < matrices; ++i) {
    uint16_t matrix[8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int half = 0; half < 2; ++half) {
        const Element at = element<Transposed>(lane, half);
        matrix[at.row][at.column] = static_cast<uint16_t>(c.source<uint32_t>(1 + i)[lane] >> (16 * half));
      }
    }
    for (int row = 0; row < 8; ++row) {
      const int lane = static_cast<int>(8 * i) + row;
      const uint32_t address = static_cast<uint32_t>(rows.addresses[lane]);
      std::memcpy(c.machine.shared.store(address, kRowBytes, c.warp.thread(lane), matrix[row]), matrix[row], kRowBytes);
    }
  }
  c.machine.counters.count_shared(rows.addresses, rows.lanes, kRowBytes);
}

// d = a b + c of 16 x K by K x 8. Sources: the registers of a, b, c.
template <class T, int K>
void multiply(Context& c) {
  constexpr int kPerRegister = 4 / kElementBytes<T>;
  constexpr int kRegistersA = 16 * K / kLanes / kPerRegister, kRegistersB = 8 * K / kLanes / kPerRegister;
  float a[16][K], b[K][8], d[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < kRegistersA; ++i) {
      for (int part = 0; part < kPerRegister; ++part) {
        const Position at = position_a<T>(lane, i, part);
        a[at.row][at.column] = operand_element<T>(c.source<uint32_t>(i)[lane], part);
      }
    }
    for (int i = 0; i < kRegistersB; ++i) {
      for (int part = 0; part < kPerRegister; ++part) {
        const Position at = position_b<T>(lane, i, part);
        b[at.row][at.column] = operand_element<T>(c.source<uint32_t>(kRegistersA + i)[lane], part);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const Position at = position_d(lane, i);
      d[at.row][at.column] = c.source<float>(kRegistersA + kRegistersB + i)[lane];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Position at = position_d(lane, i);
      c.destination<float>(i).set(lane, d[at.row][at.column]);
    }
  }
  ++c.machine.counters.mma;
}

}  // namespace

void add_matrices(Registry& r) {
  const auto add = [&](const std::string& name, Handler handler) { r.add(name, handler, Control::whole_warp); };
  add("ldmatrix", load_matrices<false>);
  add("ldmatrix.trans", load_matrices<true>);
  add("stmatrix", store_matrices<false>);
  add("stmatrix.trans", store_matrices<true>);
  add("mma.m16n8k16.f16", multiply<Half, 16>);
  add("mma.m16n8k16.bf16", multiply<BFloat16, 16>);
  add("mma.m16n8k8.f16", multiply<Half, 8>);
  add("mma.m16n8k8.bf16", multiply<BFloat16, 8>);
  add("mma.m16n8k8.tf32", multiply<Tf32, 8>);
  add("mma.m16n8k4.tf32", multiply<Tf32, 4>);
}

}  // namespace emulation
