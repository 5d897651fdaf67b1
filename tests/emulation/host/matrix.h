// Matrix fragments of a warp: loads from shared memory, and products.
//
// A lane holds of an 8 x 8 matrix the row g and the columns 2 q, 2 q + 1, where g = lane / 4 and q = lane % 4.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "warp.h"

namespace rk::host {

constexpr int kMatrixRowBytes = 16;

struct MatrixFragments {
  uint32_t of_matrix[4];
};

// Four matrices of 8 x 8 elements of 2 bytes, of which lane i points to row i % 8 of matrix i / 8.
template <bool TRANSPOSED>
MatrixFragments load_four_matrices(const void* row) {
  const char* name = TRANSPOSED ? "load_matrices_transposed" : "load_matrices";
  block().check_shared(row, kMatrixRowBytes, name);
  if constexpr (kThreadSanitizer) {  // the lane's own read, where it is seen
    const auto* words = static_cast<const volatile uint64_t*>(row);
    (void)words[0], (void)words[1];
  }
  using Row = const uint16_t*;
  const auto combine = [](const Lanes<Row>& rows, MatrixFragments(&results)[kWarpLanes]) {
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int matrix = 0; matrix < 4; ++matrix) {
        const int first = matrix * 8;
        const uint32_t low = TRANSPOSED ? rows[first + 2 * q][g] : rows[first + g][2 * q];
        const uint32_t high = TRANSPOSED ? rows[first + 2 * q + 1][g] : rows[first + g][2 * q + 1];
        results[lane].of_matrix[matrix] = low | high << 16;
      }
    }
  };
  return exchange<MatrixFragments>({name}, ~0u, static_cast<Row>(row), combine);
}

template <class T>
float half_of(uint32_t pair, int half) {
  const auto value = std::bit_cast<T>(static_cast<uint16_t>(half ? pair >> 16 : pair));
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(value);
  else
    return __bfloat162float(value);
}

struct Product {
  float d[4];
};

struct ProductOperand {
  float d[4];
  uint32_t a[4], b[2];
};

// d + a b of a [16, 16], b [16, 8] and d [16, 8], which consist of 8 x 8 matrices; b's are held transposed.
template <class T>
void multiply_fragments(const Lanes<ProductOperand>& lanes, Product (&results)[kWarpLanes]) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const ProductOperand& of_lane = lanes[lane];
    const int g = lane / 4;
    for (int half = 0; half < 2; ++half) {
      const int column = lane % 4 * 2 + half;
      a[g][column] = half_of<T>(of_lane.a[0], half);
      a[g + 8][column] = half_of<T>(of_lane.a[1], half);
      a[g][column + 8] = half_of<T>(of_lane.a[2], half);
      a[g + 8][column + 8] = half_of<T>(of_lane.a[3], half);
      b[column][g] = half_of<T>(of_lane.b[0], half);
      b[column + 8][g] = half_of<T>(of_lane.b[1], half);
      d[g][column] = of_lane.d[half];
      d[g + 8][column] = of_lane.d[2 + half];
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const int g = lane / 4, column = lane % 4 * 2;
    results[lane] = {d[g][column], d[g][column + 1], d[g + 8][column], d[g + 8][column + 1]};
  }
}

}  // namespace rk::host
