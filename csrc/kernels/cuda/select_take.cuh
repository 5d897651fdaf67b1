// Takes the candidates with the largest totals of each chunk, and writes them as a list of keys or of blocks.
#pragma once
#include "kernels/cuda/select.cuh"

namespace rk::cuda {

constexpr int kDigits = 256;  // values of a digit of 8 bits

// In shared memory.
struct SelectState {
  int counts[kDigits];
  int sums[kAttentionThreads / kWarp];
  // Of each warp.
  int larger[kAttentionThreads / kWarp], equal[kAttentionThreads / kWarp], below[kAttentionThreads / kWarp];
  uint32_t digit;
  int left;
};

// Writes one list; there is a thread block for each. Each warp has a range of the candidates.
struct SelectTake {
  static constexpr int kWarps = kAttentionThreads / kWarp;

  const SelectArguments& p;
  SelectState& state;
  int warp, lane;
  SelectChunk at;
  LocalWindow window;
  const int32_t* chosen;
  const float* totals;
  int32_t* list;
  int candidates, begin, end;  // how many there are; the warp's range

  __device__ void run() {
    at.take(p, blockIdx.x);
    if (at.head >= p.heads || at.chunk >= p.chunks) return;
    window = p.window(at.b, at.chunk);
    if (!p.with_window) window.begin = window.end = 0;
    if (p.wanted >= 0) window.most = p.wanted;
    chosen = p.chosen ? p.chosen + at.row(p) * p.n_chosen : nullptr;
    totals = p.totals + int64_t{blockIdx.x} * p.stride;
    list = p.lists + (at.head * p.list_rows + at.chunk) * p.list_length;
    candidates = chosen ? filled(chosen, p.n_chosen) * kSelectBlock : seen();
    const int run = (candidates + kAttentionThreads - 1) / kAttentionThreads * kWarp;
    begin = warp * run, end = min(begin + run, candidates);

    for (int i = threadIdx.x; i < p.n_context; i += kAttentionThreads) list[i] = p.keys + i;
    const int local = write_window(list + p.n_context, false);
    const int taken = take(list + p.n_context, window.most - local, local);
    for (int i = p.n_context + local + taken + threadIdx.x; i < p.list_length; i += kAttentionThreads) list[i] = -1;
  }

  // At least as many candidates as a query of the chunk sees.
  __device__ int seen() const {
    int largest = -1;
    for (int i = 0; i < kSelectSubgroups; ++i)
      largest = max(largest, p.facts[at.row(p) * kSelectSubgroups + i].largest);
    return p.seen(largest);
  }
  __device__ int candidate(int i) const {
    return chosen ? chosen[i / kSelectBlock] * kSelectBlock + i % kSelectBlock : i;
  }
  // The bits of a total, which are ordered like it. 0: must not be taken.
  __device__ uint32_t bits(int i) const {
    const int key = candidate(i);
    const float total = key >= window.begin && key < window.end ? 0.f : totals[i];
    return total > 0.f ? __float_as_uint(total) : 0;
  }

  // Calls f(i, bits) for the warp's candidates in order, 32 at a time, with 0 for those beyond the end.
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    for (int i = begin + lane; i - lane < end; i += kWarp) f(i, i < end ? bits(i) : 0);
  }
  __device__ int before(uint32_t votes) const { return __popc(votes & ((1u << lane) - 1)); }

  // Counts the keys of the window that are no padding, and writes them if asked to. Every warp counts all of them.
  __device__ int write_window(int32_t* to, bool writes) const {
    int count = 0;
    for (int i = window.begin; i < window.end; i += kWarp) {
      const int key = i + lane;
      const bool there = key < window.end && !p.is_padded(at.b, key);
      const uint32_t votes = __ballot_sync(~0u, there);
      if (writes && there) to[count + before(votes)] = key;
      count += __popc(votes);
    }
    return count;
  }

  // Finds the bits of the `wanted`-th largest total, digit by digit, and in `equal` how many of the totals with these
  // bits are to be taken. If there are fewer candidates all are taken.
  __device__ uint32_t find_least(int wanted, int& equal) {
    uint32_t found = 0;
    equal = wanted;
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = threadIdx.x; i < kDigits; i += kAttentionThreads) state.counts[i] = 0;
      __syncthreads();
      each([&](int, uint32_t x) {
        const bool counts = x != 0 && (shift == 24 || x >> (shift + 8) == found >> (shift + 8));
        if (counts) atomicAdd(&state.counts[x >> shift & (kDigits - 1)], 1);
      });
      __syncthreads();
      // Each thread has two digits, from the largest on.
      const uint32_t digit = kDigits - 1 - 2 * threadIdx.x;
      const int high = state.counts[digit], both = high + state.counts[digit - 1];
      const Scan scan = scan_block(both, state.sums);
      if (shift == 24 && scan.total <= equal) return 1;
      if (scan.before < equal && equal <= scan.before + both) {
        const bool lower = equal > scan.before + high;
        state.digit = digit - lower, state.left = equal - scan.before - (lower ? high : 0);
      }
      __syncthreads();
      found |= state.digit << shift, equal = state.left;
    }
    return found;
  }

  // Writes the largest candidates in rising order, with the window of `local` keys among them. Returns how many they
  // are.
  __device__ int take(int32_t* to, int wanted, int local) {
    int ties = 0;
    const uint32_t least = wanted > 0 && candidates > 0 ? find_least(wanted, ties) : UINT32_MAX;
    int larger = 0, equal = 0;
    each([&](int, uint32_t x) {
      larger += __popc(__ballot_sync(~0u, x > least)), equal += __popc(__ballot_sync(~0u, x == least));
    });
    if (lane == 0) state.larger[warp] = larger, state.equal[warp] = equal;
    __syncthreads();
    int written = 0, tied = 0;
    for (int i = 0; i < warp; ++i) written += state.larger[i], tied += state.equal[i];
    written += min(tied, ties);
    int below = 0;  // keys taken that are before the window
    each([&](int i, uint32_t x) {
      const uint32_t same = __ballot_sync(~0u, x == least);
      const bool taken = x > least || (x == least && tied + before(same) < ties);
      const uint32_t votes = __ballot_sync(~0u, taken);
      const int key = candidate(min(i, candidates - 1));
      if (taken) to[written + before(votes) + (key >= window.end ? local : 0)] = key;
      below += __popc(__ballot_sync(~0u, taken && key < window.begin));
      written += __popc(votes), tied += __popc(same);
    });
    if (lane == 0) state.below[warp] = below;
    if (threadIdx.x == kAttentionThreads - 1) state.left = written;
    __syncthreads();
    below = 0;
    for (int i = 0; i < kWarps; ++i) below += state.below[i];
    if (warp == 0) write_window(to + below, true);
    return state.left;
  }
};

__global__ void __launch_bounds__(kAttentionThreads, 8) select_take_kernel(const __grid_constant__ SelectArguments p) {
  __shared__ SelectState state;
  SelectTake take{p, state, int(threadIdx.x) / kWarp, int(threadIdx.x) % kWarp};
  take.run();
}

}  // namespace rk::cuda
