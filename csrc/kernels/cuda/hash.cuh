// Angular LSH: a block projects tiles of tokens onto rotations that stay in shared memory, and takes argmaxes in
// registers.
//
// Rows of 2-byte types are multiplied by tensor cores, with rotations split into two terms of that type, so that
// buckets are those of float32 rotations. float32 rows are multiplied by FFMA.
//
// Columns of the rotations go in tiles of 8, each of one factor of one round; a tile's description says where its
// columns are, and whether a factor or a round ends with it. A thread has the columns 2q, 2q + 1 (q = lane % 4) of the
// rows g, g + 8, g + 16, g + 24 (g = lane / 4) of its warp, in either arithmetic.
#pragma once
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/plan.h"

namespace rk::cuda {

struct HashArguments {
  const void* x;  // rows of D elements, the last dimension contiguous
  int64_t stride_b, stride_h, stride_l;
  const float* rotations;  // [D, columns] of a head
  int64_t rotations_stride_b, rotations_stride_h, columns;
  const bool* padding;  // [B, L] or null
  int32_t* buckets;     // [B, H, R, L]
  int64_t L;
  int H, R, D, n_factors, padding_bucket;
  int halves[kHashMaxFactors];  // of the factors
  int round_tiles, rounds_per_block, resident_tiles, blocks_per_head, tokens_per_block;
  bool aligned;  // rows can be copied 16 bytes at a time
};

struct ColumnTile {
  int column, count;  // of the rotations
  int index, half;    // number of the first column in its factor, and columns of the factor
  int radix;          // of the factor if it ends here, or 0
  int round;          // the round if it ends here, or -1
};

__device__ __forceinline__ ColumnTile column_tile(const HashArguments& p, int tile) {
  int columns_of_round = 0;
  for (int f = 0; f < p.n_factors; ++f) columns_of_round += p.halves[f];
  const int round = tile / p.round_tiles;
  int rest = tile % p.round_tiles, column = round * columns_of_round, radix = 1;
  for (int f = 0;; ++f) {
    const int half = p.halves[f], tiles = (half + kHashColumns - 1) / kHashColumns;
    if (rest < tiles) {
      const int index = rest * kHashColumns;
      const bool ends = rest == tiles - 1;
      return {column + index,   min(half - index, kHashColumns),          index, half,
              ends ? radix : 0, ends && f == p.n_factors - 1 ? round : -1};
    }
    rest -= tiles, column += half, radix *= 2 * half;
  }
}

// The next term of the sum of terms of type T that a value is split into.
template <class T>
__device__ __forceinline__ T split(float& rest) {
  const T term = from_float<T>(rest);
  rest -= to_float(term);
  return term;
}

template <class T>
constexpr int kHashTerms = hash_terms(sizeof(T));

// Where things are in shared memory: rows of x warp by warp, then column tiles [terms][16 * K_STEPS][8].
template <class T, int K_STEPS>
struct HashLayout {
  static constexpr int kDepth = 16 * K_STEPS;
  static constexpr int kRowBytes = hash_row_bytes(sizeof(T), K_STEPS);
  static constexpr int kTileBytes = hash_column_tile_bytes(sizeof(T), K_STEPS);
  unsigned char* memory;

  int rows;  // of all warps

  __device__ unsigned char* row(int row) const { return memory + row * kRowBytes; }
  __device__ T* column_row(int tile, int term, int k) const {
    unsigned char* tiles = memory + rows * kRowBytes;
    return reinterpret_cast<T*>(tiles + tile * kTileBytes) + (term * kDepth + k) * kHashColumns;
  }
};

// The block loads `count` column tiles. Beyond the head size and the factor there are zeros, which are never the best.
template <class T, int K_STEPS>
__device__ void load_columns(const HashArguments& p, const HashLayout<T, K_STEPS>& layout, const ColumnTile* tiles,
                             const float* rotations, int count) {
  const int width = count * kHashColumns;
  for (int i = threadIdx.x; i < HashLayout<T, K_STEPS>::kDepth * width; i += blockDim.x) {
    const int k = i / width, tile = i % width / kHashColumns, column = i % kHashColumns;
    const bool inside = k < p.D && column < tiles[tile].count;
    float rest = inside ? __ldg(rotations + k * p.columns + tiles[tile].column + column) : 0.f;
#pragma unroll
    for (int term = 0; term < kHashTerms<T>; ++term) layout.column_row(tile, term, k)[column] = split<T>(rest);
  }
}

// The warp loads its rows of the tile of tokens that begins at `first`, zeros beyond the sequence and the head size.
template <class T, int K_STEPS>
__device__ void load_rows(const HashArguments& p, const HashLayout<T, K_STEPS>& layout, const T* x, int64_t first,
                          int warp, int lane) {
  constexpr int kDepth = 16 * K_STEPS, kPerCopy = 16 / sizeof(T), kCopies = kDepth / kPerCopy;
  if (p.aligned) {
#pragma unroll 4
    for (int i = lane; i < kWarp * kCopies; i += kWarp) {
      const int row = i / kCopies, d = i % kCopies * kPerCopy;
      const int64_t token = first + warp * kWarp + row;
      const bool inside = token < p.L && d < p.D;
      copy_async(layout.row(warp * kWarp + row) + d * sizeof(T), inside ? x + token * p.stride_l + d : x,
                 inside ? 16 : 0);
    }
  } else {
    for (int i = lane; i < kWarp * kDepth; i += kWarp) {
      const int row = i / kDepth, d = i % kDepth;
      const int64_t token = first + warp * kWarp + row;
      const bool inside = token < p.L && d < p.D;
      reinterpret_cast<T*>(layout.row(warp * kWarp + row))[d] = inside ? x[token * p.stride_l + d] : from_float<T>(0.f);
    }
  }
  commit_copies();
}

// What a warp multiplies its rows with two column tiles by.
// products[tile][m][2 * h + j]: row 16 m + 8 h + g, column 2 q + j.
using HashProducts = float[2][2][4];

template <class T, int K_STEPS>
struct HashProjector {
  uint32_t fragments[2][K_STEPS][4];

  __device__ void take_rows(const HashLayout<T, K_STEPS>& layout, int warp, int lane) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int k = 0; k < K_STEPS; ++k)
        load_matrices(fragments[m][k], layout.row(warp * kWarp + m * 16 + lane % 16) + (k * 2 + lane / 16) * 16);
  }

  __device__ void project(HashProducts& products, const HashLayout<T, K_STEPS>& layout, int tile, int, int lane) const {
#pragma unroll
    for (int term = 0; term < kHashTerms<T>; ++term)
#pragma unroll
      for (int k = 0; k < K_STEPS; k += 2)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t columns[4];
          load_matrices_transposed(columns, layout.column_row(tile + i, term, k * 16 + lane));
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply_add<T>(products[i][m], fragments[m][k], columns[0], columns[1]);
            multiply_add<T>(products[i][m], fragments[m][k + 1], columns[2], columns[3]);
          }
        }
  }
};

template <int K_STEPS>
struct HashProjector<float, K_STEPS> {
  __device__ void take_rows(const HashLayout<float, K_STEPS>&, int, int) {}

  __device__ void project(HashProducts& products, const HashLayout<float, K_STEPS>& layout, int tile, int warp,
                          int lane) const {
    const unsigned char* rows = layout.row(warp * kWarp + lane / 4);
    const float* columns[2];
    for (int i = 0; i < 2; ++i) columns[i] = layout.column_row(tile + i, 0, 0) + lane % 4 * 2;
#pragma unroll 2
    for (int k = 0; k < 16 * K_STEPS; k += 4) {
      float4 x[4];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        x[r] =
            *reinterpret_cast<const float4*>(rows + r * 8 * HashLayout<float, K_STEPS>::kRowBytes + k * sizeof(float));
#pragma unroll
      for (int d = 0; d < 4; ++d)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 column = *reinterpret_cast<const float2*>(columns[i] + (k + d) * kHashColumns);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float value = d == 0 ? x[r].x : d == 1 ? x[r].y : d == 2 ? x[r].z : x[r].w;
            float* to = products[i][r / 2] + r % 2 * 2;
            to[0] = fmaf(value, column.x, to[0]);
            to[1] = fmaf(value, column.y, to[1]);
          }
        }
    }
  }
};

// The projection of largest size so far, and its column in the factor. Of equal sizes it is the first that was seen, so
// that a row of zeros is in bucket 0.
struct Best {
  float y = 0.f;
  int column = 0;

  __device__ void see(float other, int at) {
    const bool larger = fabsf(other) > fabsf(y);
    y = larger ? other : y;
    column = larger ? at : column;
  }
  __device__ void merge(float other, int at) {  // of another lane
    const bool better = fabsf(other) > fabsf(y) || (fabsf(other) == fabsf(y) && at < column);
    y = better ? other : y;
    column = better ? at : column;
  }
};

// What a lane knows of its four rows in a round.
struct HashRows {
  Best best[4];
  int bucket[4] = {};

  __device__ void see(const float (&products)[2][4], int column) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int j = 0; j < 2; ++j) best[r].see(products[r / 2][r % 2 * 2 + j], column + j);
  }

  // The factor is complete: its digit is that of the best of the four lanes that share the rows.
  __device__ void add_digit(const ColumnTile& tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float y = __shfl_xor_sync(~0u, best[r].y, step);
        const int column = __shfl_xor_sync(~0u, best[r].column, step);
        best[r].merge(y, column);
      }
      bucket[r] += tile.radix * (best[r].column + (best[r].y < 0.f ? tile.half : 0));
      best[r] = {};
    }
  }

  // The round is complete: the bucket of row 8 r + g is for lane r of its four to write.
  __device__ int take_bucket(int r) {
    const int mine = r == 0 ? bucket[0] : r == 1 ? bucket[1] : r == 2 ? bucket[2] : bucket[3];
    bucket[0] = bucket[1] = bucket[2] = bucket[3] = 0;
    return mine;
  }
};

template <class T, int K_STEPS>
__global__ void __launch_bounds__(kHashMaxWarps* kWarp, kHashWarps / kHashMaxWarps)
    hash_kernel(const __grid_constant__ HashArguments p) {
  RK_DYNAMIC_SHARED(memory);
  __shared__ ColumnTile tiles[kHashMaxTiles];
  const int rows = static_cast<int>(blockDim.x);  // one a thread
  const HashLayout<T, K_STEPS> layout{memory, rows};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int groups = (p.R + p.rounds_per_block - 1) / p.rounds_per_block;  // of rounds
  const int group = blockIdx.x % groups, share = blockIdx.x / groups % p.blocks_per_head;
  const int64_t head = blockIdx.x / groups / p.blocks_per_head, b = head / p.H, h = head % p.H;
  const int64_t begin = int64_t(share) * p.tokens_per_block, end = min(begin + p.tokens_per_block, p.L);
  const int first_tile = group * p.rounds_per_block * p.round_tiles;
  const int end_tile = min(first_tile + p.rounds_per_block * p.round_tiles, p.R * p.round_tiles);
  const T* x = static_cast<const T*>(p.x) + b * p.stride_b + h * p.stride_h;
  const float* rotations = p.rotations + b * p.rotations_stride_b + h * p.rotations_stride_h;

  load_rows(p, layout, x, begin, warp, lane);
  for (int64_t first = begin; first < end; first += rows) {
    HashProjector<T, K_STEPS> projector;
    wait_for_copies<0>();
    __syncwarp();
    projector.take_rows(layout, warp, lane);
    if constexpr (sizeof(T) == 2) {  // the rows are in registers: the next ones may come
      __syncwarp();
      if (first + rows < end) load_rows(p, layout, x, first + rows, warp, lane);
    }
    HashRows mine;
    for (int start = first_tile; start < end_tile; start += p.resident_tiles) {
      const int count = min(p.resident_tiles, end_tile - start), even = count + count % 2;
      if (first == begin || p.resident_tiles < end_tile - first_tile) {
        __syncthreads();
        for (int i = threadIdx.x; i < even; i += blockDim.x)
          tiles[i] = i < count ? column_tile(p, start + i) : ColumnTile{0, 0, 0, 0, 0, -1};
        __syncthreads();
        load_columns(p, layout, tiles, rotations, even);
        __syncthreads();
      }
      for (int pair = 0; pair < even; pair += 2) {
        HashProducts products = {};
        projector.project(products, layout, pair, warp, lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const ColumnTile tile = tiles[pair + i];
          mine.see(products[i], tile.index + lane % 4 * 2);
          if (tile.radix) mine.add_digit(tile);
          if (tile.round < 0) continue;
          const int64_t token = first + warp * kWarp + lane % 4 * 8 + lane / 4;
          const int bucket = mine.take_bucket(lane % 4);
          if (token < p.L)
            p.buckets[(head * p.R + tile.round) * p.L + token] =
                p.padding && p.padding[b * p.L + token] ? p.padding_bucket : bucket;
        }
      }
    }
    if constexpr (sizeof(T) == 4) {
      __syncwarp();
      if (first + rows < end) load_rows(p, layout, x, first + rows, warp, lane);
    }
  }
}

}  // namespace rk::cuda
