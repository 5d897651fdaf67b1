// The sample kernels and their launchers.
#include "kernels/cuda/device.cuh"
#include "samples.h"

namespace rk::samples {

using namespace rk::cuda;

// A tree in shared memory.
__global__ void __launch_bounds__(kSumThreads) block_sums_kernel(const __grid_constant__ BlockSums p) {
  RK_DYNAMIC_SHARED(memory);
  int32_t* values = reinterpret_cast<int32_t*>(memory);
  const int thread = threadIdx.x;
  values[thread + (p.fault == Fault::kSharedOverflow)] = p.x[blockIdx.x * kSumThreads + thread];
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    if (p.fault != Fault::kNoBarrier) __syncthreads();
    if (thread < half) values[thread] += values[thread + half];
  }
  if (p.fault != Fault::kNoBarrier) __syncthreads();
  if (thread == 0 || p.fault == Fault::kDuplicateStore)
    p.sums[p.fault == Fault::kBlocksCollide ? 0 : blockIdx.x] = values[0];
}

int block_sums(const BlockSums& p) {
  return launch(block_sums_kernel, {{uint32_t(p.blocks), 1, 1}, kSumThreads, kSumThreads * sizeof(int32_t)}, p,
                nullptr);
}

__global__ void __launch_bounds__(kRankThreads) warp_ranks_kernel(const __grid_constant__ WarpRanks p) {
  const int thread = threadIdx.x, lane = thread % warpSize, key = p.keys[thread];
  if (p.fault == Fault::kLaneMissing && thread == 40) return;
  if (p.fault == Fault::kDivergent && lane % 2) {
    p.odd[thread] = __popc(__ballot_sync(~0u, key % 2));
    return;
  }
  int sum = key;
  for (int step = 1; step < warpSize; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  p.sums[thread] = sum;
  p.next[thread] = __shfl_down_sync(~0u, key, 1);
  p.ranks[thread] = __popc(__match_any_sync(~0u, key) & ((1u << lane) - 1));
  const unsigned mask = p.fault == Fault::kWrongMask ? ~1u : ~0u;
  p.odd[thread] = __popc(__ballot_sync(mask, key % 2));
}

int warp_ranks(const WarpRanks& p) { return launch(warp_ranks_kernel, {{1, 1, 1}, kRankThreads, 0}, p, nullptr); }

__global__ void __launch_bounds__(32) warp_words_kernel(const __grid_constant__ WarpWords p) {
  const int lane = threadIdx.x, x = p.x[lane];
  const auto shuffled = [&](int row, int value) { p.shuffled[row * 32 + lane] = value; };
  shuffled(0, __shfl_sync(~0u, x, p.amount, p.width));
  shuffled(1, __shfl_up_sync(~0u, x, p.amount, p.width));
  shuffled(2, __shfl_down_sync(~0u, x, p.amount, p.width));
  shuffled(3, __shfl_xor_sync(~0u, x, p.amount, p.width));
  if (lane % 2 == 0) shuffled(4, __shfl_sync(0x55555555u, x, 2 * p.amount));
  __syncwarp();

  const unsigned bits = x;
  const int words[kWords] = {__popc(bits),
                             __clz(x),
                             __ffs(x),
                             static_cast<int>(__brev(bits)),
                             __reduce_add_sync(~0u, x),
                             __reduce_min_sync(~0u, x),
                             __reduce_max_sync(~0u, x),
                             static_cast<int>(__reduce_and_sync(~0u, bits)),
                             static_cast<int>(__reduce_or_sync(~0u, bits)),
                             static_cast<int>(__reduce_xor_sync(~0u, bits)),
                             __any_sync(~0u, x < 0),
                             __all_sync(~0u, x < 0),
                             min(x, 0),
                             max(x, 0)};
  for (int i = 0; i < kWords; ++i) p.words[i * 32 + lane] = words[i];

  atomicAdd(&p.counters[0], x);
  atomicMin(&p.counters[1], x);
  atomicMax(&p.counters[2], x);
  atomicAnd(&p.counters[3], x);
  atomicOr(&p.counters[4], x);
  if (lane == 0) atomicExch(&p.counters[5], x);
  __syncwarp();
  if (lane == 1) atomicCAS(&p.counters[5], p.x[0], x);
}

int warp_words(const WarpWords& p) { return launch(warp_words_kernel, {{1, 1, 1}, 32, 0}, p, nullptr); }

// One buffer is filled while the other is read, of which a thread reads what another one has copied.
__global__ void __launch_bounds__(kDoubledThreads) doubled_kernel(const __grid_constant__ Doubled p) {
  RK_DYNAMIC_SHARED(memory);
  const int thread = threadIdx.x, tiles = (p.n + kDoubledTile - 1) / kDoubledTile;
  float* buffers = reinterpret_cast<float*>(memory);
  const auto fetch = [&](int tile) {
    const int i = tile * kDoubledTile + thread * 4;
    const int inside = p.fault == Fault::kBeyondGlobal ? 4 : max(0, min(4, p.n - i));
    float* to = buffers + tile % 2 * kDoubledTile + thread * 4;
    if (p.fault == Fault::kBeyondShared) to += kDoubledTile + 4;
    const float* from = inside ? p.x + i : p.x;
    copy_async(to, from + (p.fault == Fault::kMisalignedCopy), inside * static_cast<int>(sizeof(float)));
    commit_copies();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles)
      fetch(tile + 1);
    else
      commit_copies();
    if (p.fault != Fault::kNoWait) wait_for_copies<1>();
    __syncthreads();
    for (int k = 0; k < 4; ++k) {
      const int column = k * kDoubledThreads + thread, i = tile * kDoubledTile + column;
      const float doubled = 2.f * buffers[tile % 2 * kDoubledTile + column];
      if (i < p.n) p.y[i] = doubled;
    }
    __syncthreads();
  }
}

int doubled(const Doubled& p) {
  return launch(doubled_kernel, {{1, 1, 1}, kDoubledThreads, 2 * kDoubledTile * sizeof(float)}, p, nullptr);
}

// A warp multiplies tiles; rows of a have 16 bytes more, so that they begin in different banks.
constexpr int kRowOfA = 2 * kProductDepth + 16, kRowOfB = 2 * kProductColumns;
constexpr int kProductShared = kProductRows * kRowOfA + kProductDepth * kRowOfB;

template <class T>
__global__ void __launch_bounds__(32) product_kernel(const __grid_constant__ Product p) {
  RK_DYNAMIC_SHARED(memory);
  unsigned char* const a_rows = memory;
  unsigned char* const b_rows = memory + kProductRows * kRowOfA;
  const T* a = static_cast<const T*>(p.a) + int64_t(blockIdx.y) * kProductRows * p.K;
  const T* b = static_cast<const T*>(p.b) + blockIdx.x * kProductColumns;
  const int lane = threadIdx.x;
  float sums[4] = {};
  for (int k = 0; k < p.K; k += kProductDepth) {
    __syncwarp();
    for (int i = lane; i < kProductRows * kProductDepth / 8; i += 32) {
      const int row = i / (kProductDepth / 8), column = i % (kProductDepth / 8) * 8;
      copy_async(a_rows + row * kRowOfA + 2 * column, a + int64_t(row) * p.K + k + column);
    }
    copy_async(b_rows + lane * kRowOfB, b + int64_t(k + lane) * p.N);
    commit_copies();
    wait_for_copies<0>();
    if (p.fault != Fault::kNoBarrier) __syncwarp();
    uint32_t a_fragments[2][4], b_fragments[4];
    const int shift = p.fault == Fault::kMisalignedRow ? 2 : 0;
    for (int i = 0; i < 2; ++i)
      load_matrices(a_fragments[i], a_rows + lane % 16 * kRowOfA + i * 32 + lane / 16 * 16 + shift);
    load_matrices_transposed(b_fragments, b_rows + lane * kRowOfB);
    for (int i = 0; i < 2; ++i) multiply_add<T>(sums, a_fragments[i], b_fragments[2 * i], b_fragments[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = blockIdx.y * kProductRows + i / 2 * 8 + lane / 4;
    const int column = blockIdx.x * kProductColumns + lane % 4 * 2 + i % 2;
    p.c[row * p.N + column] = sums[i];
  }
}

int product(const Product& p) {
  const Launch shape{{uint32_t(p.N / kProductColumns), uint32_t(p.M / kProductRows), 1}, 32, kProductShared};
  return launch(p.bfloat16 ? product_kernel<bf16> : product_kernel<fp16>, shape, p, nullptr);
}

}  // namespace rk::samples
