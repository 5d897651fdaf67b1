// Tiles of 64 rows in shared memory, and the products of chunk attention: a warp has 16 of the rows that a block owns.
//
// A lane has the rows g and g + 8 (g = lane / 4) of its warp, and of each 8 columns 2q and 2q + 1 (q = lane % 4):
// x[n][2 h + j] is row g + 8 h, column 8 n + 2 q + j.
#pragma once
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/plan.h"

namespace rk::cuda {

// The 16-byte vectors of a row are swizzled, so that 8 rows that are read together have no bank conflicts.
template <class T, int K_STEPS>
struct TileLayout {
  static constexpr int kRowBytes = attention_row_bytes(sizeof(T), K_STEPS), kVectors = kRowBytes / 16;
  static_assert(kVectors % 8 == 0 || 8 % kVectors == 0, "the swizzle is within 8 vectors, or within all of a row");
  static constexpr int kBytes = kAttentionRows * kRowBytes;

  __device__ static unsigned char* vector(unsigned char* tile, int row, int vector) {
    const int swizzle = kVectors >= 8 ? row % 8 : row / (8 / kVectors) % kVectors;
    return tile + row * kRowBytes + ((vector ^ swizzle) << 4);
  }
  // The elements d and d + 1 of a row, for an even d.
  __device__ static T* pair(unsigned char* tile, int row, int d) {
    constexpr int kPerVector = 16 / sizeof(T);
    return reinterpret_cast<T*>(vector(tile, row, d / kPerVector)) + d % kPerVector;
  }
};

// Rows of a tensor to load into a tile. A null tile loads nothing; rows from `end` on, and -1, become zeros.
template <class T>
struct TileRows {
  unsigned char* tile;
  const T* rows;
  int64_t stride;
  int width, end;
};

// Starts to load the rows row_at(0), row_at(1), ... of two tensors. aligned: they can be copied 16 bytes at a time.
template <int K_STEPS, class T, class RowAt>
__device__ __forceinline__ void load_tiles(bool aligned, const TileRows<T>& a, const TileRows<T>& b, RowAt&& row_at) {
  using Layout = TileLayout<T, K_STEPS>;
  static_assert(kAttentionThreads % Layout::kVectors == 0, "each thread has one column of vectors");
  constexpr int kRowsAtOnce = kAttentionThreads / Layout::kVectors, kPerVector = 16 / sizeof(T);
  const int part = threadIdx.x % Layout::kVectors, column = part * kPerVector;
  const auto each = [&](auto&& load) {
#pragma unroll 4
    for (int row = threadIdx.x / Layout::kVectors; row < kAttentionRows; row += kRowsAtOnce) {
      const int at = row_at(row);
      if (a.tile) load(a, row, at);
      if (b.tile) load(b, row, at);
    }
  };
  const auto is_there = [](const TileRows<T>& x, int at) {
    return static_cast<uint32_t>(at) < static_cast<uint32_t>(x.end);
  };
  if (aligned) {
    each([&](const TileRows<T>& x, int row, int at) {  // with 0 bytes to copy the address may be anything
      copy_async(Layout::vector(x.tile, row, part), x.rows + at * x.stride + column,
                 is_there(x, at) && column < x.width ? 16 : 0);
    });
  } else {
    each([&](const TileRows<T>& x, int row, int at) {
      T* to = reinterpret_cast<T*>(Layout::vector(x.tile, row, part));
      for (int i = 0; i < kPerVector; ++i) {
        const bool inside = is_there(x, at) && column + i < x.width;
        to[i] = inside ? x.rows[at * x.stride + column + i] : from_float<T>(0.f);
      }
    });
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Transposes the 4 x 4 words of the four lanes that share a row: word i of lane j becomes word j of lane i.
__device__ __forceinline__ void quad_transpose(uint32_t (&words)[4], int lane) {
  const bool odd = lane & 1, top = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? other : words[i];
    words[i + 1] = odd ? words[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(~0u, top ? words[i] : words[i + 2], 2);
    words[i] = top ? other : words[i];
    words[i + 2] = top ? words[i + 2] : other;
  }
}

// The warp's rows of an owned tile as left operands. KEPT: they stay in registers, else they are read for every use.
template <class T, int K_STEPS, bool KEPT>
struct OwnedRows {
  unsigned char* tile;
  uint32_t kept[KEPT ? K_STEPS : 1][4];

  __device__ void take(unsigned char* tile_, int warp, int lane) {
    tile = tile_;
    if constexpr (KEPT) {
#pragma unroll
      for (int k = 0; k < K_STEPS; ++k) load(kept[k], k, warp, lane);
    }
  }
  __device__ void get(uint32_t (&to)[4], int k, int warp, int lane) const {
    if constexpr (KEPT) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = kept[k][i];
    } else {
      load(to, k, warp, lane);
    }
  }
  __device__ void load(uint32_t (&to)[4], int k, int warp, int lane) const {
    load_matrices(to, TileLayout<T, K_STEPS>::vector(tile, warp * 16 + lane % 16, 2 * k + lane / 16));
  }
};

template <int K_STEPS, bool KEPT>
struct OwnedRows<float, K_STEPS, KEPT> {
  unsigned char* tile;
  __device__ void take(unsigned char* tile_, int, int) { tile = tile_; }
};

// s += owned rows times the transposed rows of `tile` from `first` on, which are 8 N columns of s.
template <class T, int K_STEPS, bool KEPT, int N>
__device__ __forceinline__ void multiply_rows(float (&s)[N][4], const OwnedRows<T, K_STEPS, KEPT>& owned,
                                              unsigned char* tile, int first, int warp, int lane) {
  using Layout = TileLayout<T, K_STEPS>;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
      uint32_t a[4];
      owned.get(a, k, warp, lane);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t b[4];
        load_matrices(b, Layout::vector(tile, first + n * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        multiply_add<T>(s[n], a, b[0], b[1]);
        multiply_add<T>(s[n + 1], a, b[2], b[3]);
      }
    }
  } else {
#pragma unroll 1
    for (int vector = 0; vector < Layout::kVectors; ++vector) {
      float4 a[2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        a[h] = *reinterpret_cast<const float4*>(Layout::vector(owned.tile, warp * 16 + h * 8 + lane / 4, vector));
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float4 b =
              *reinterpret_cast<const float4*>(Layout::vector(tile, first + n * 8 + lane % 4 * 2 + j, vector));
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& sum = s[n][2 * h + j];
            sum = fmaf(a[h].x, b.x, fmaf(a[h].y, b.y, fmaf(a[h].z, b.z, fmaf(a[h].w, b.w, sum))));
          }
        }
    }
  }
}

// sums += weights, of 8 N columns, times the rows of `tile` from `first` on.
template <class T, int K_STEPS, int N>
__device__ __forceinline__ void multiply_columns(float (&sums)[2 * K_STEPS][4], const float (&weights)[N][4],
                                                 unsigned char* tile, int first, int lane) {
  using Layout = TileLayout<T, K_STEPS>;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      const float (&low)[4] = weights[2 * k], (&high)[4] = weights[2 * k + 1];
      const uint32_t a[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]),
                             pack<T>(high[2], high[3])};
#pragma unroll
      for (int n = 0; n < 2 * K_STEPS; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, Layout::vector(tile, first + k * 16 + lane % 16, n + lane / 16));
        multiply_add<T>(sums[n], a, b[0], b[1]);
        multiply_add<T>(sums[n + 1], a, b[2], b[3]);
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll 1
        for (int owner = 0; owner < 4; ++owner) {
          float weight[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) weight[h] = __shfl_sync(~0u, weights[n][2 * h + j], lane / 4 * 4 + owner);
#pragma unroll
          for (int m = 0; m < 2 * K_STEPS; ++m) {
            const float2 x = *reinterpret_cast<const float2*>(
                Layout::pair(tile, first + n * 8 + owner * 2 + j, m * 8 + lane % 4 * 2));
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              sums[m][2 * h] = fmaf(weight[h], x.x, sums[m][2 * h]);
              sums[m][2 * h + 1] = fmaf(weight[h], x.y, sums[m][2 * h + 1]);
            }
          }
        }
  }
}

}  // namespace rk::cuda
