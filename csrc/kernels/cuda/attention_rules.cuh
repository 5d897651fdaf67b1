// Rules of pairs of a query and a key: a window that is a bucket, and keys that a query meets in several rounds.
#pragma once
#include "kernels/cuda/attention_sequence.cuh"

namespace rk::cuda {

// How often a query meets a key in all rounds; rows of the sequence.
__device__ inline int times_met(const AttentionArguments& p, const AttentionSequence& sequence, int query, int key) {
  int times = 0;
  for (int round = 0; round < sequence.rounds; ++round) {
    const Window window = sequence.window_of(p, round, query);
    // Of the unrolled rounds that the window touches each has the key once.
    int unrolled = floor_div(window.seen.first, sequence.length);
    for (; unrolled * sequence.length < window.seen.behind; ++unrolled) {
      const int key_round = unrolled - floor_div(unrolled, sequence.rounds) * sequence.rounds;
      const int place = sequence.places[int64_t{key_round} * p.L + key];
      const int slot = key_round * sequence.length + place, at = unrolled * sequence.length + place;
      const bool same_bucket = slot >= window.bucket.first && slot < window.bucket.behind;
      times += at >= window.seen.first && at < window.seen.behind && (same_bucket || !p.within_bucket);
    }
  }
  return times;
}

// What is added to the score, in base 2, of a query and a key that it sees, of these slots.
__device__ inline float pair_bias(const AttentionArguments& p, const AttentionSequence& sequence, int query, int key,
                                  int query_slot, int key_slot) {
  if (query == kNobody) return 0.f;
  if (p.within_bucket) {
    const Range bucket = sequence.window_of(p, sequence.wrapped(query_slot) / sequence.length, query).bucket;
    const int slot = sequence.wrapped(key_slot);
    if (slot < bucket.first || slot >= bucket.behind) return -INFINITY;
  }
  return p.dedup ? -log2f(static_cast<float>(max(times_met(p, sequence, query, key), 1))) : 0.f;
}

// Finds the place of every token in every round, and its window: a thread each, of [B, H, R, L].
__global__ void __launch_bounds__(kAttentionThreads)
    attention_windows_kernel(const __grid_constant__ AttentionArguments p) {
  const int64_t number = int64_t{blockIdx.x} * kAttentionThreads + threadIdx.x;
  const int64_t head = number / p.L / p.R;
  if (head >= p.heads) return;
  const int round = static_cast<int>(number / p.L % p.R), row = static_cast<int>(number % p.L);
  const int32_t* bounds = p.cu_seqlens + head / p.H * p.bounds_stride;  // of several sequences
  int64_t at = 0;                                                       // the last one that begins no later
  for (int64_t behind = p.n_sequences; behind - at > 1;) {
    const int64_t middle = (at + behind) / 2;
    (bounds[middle] <= row ? at : behind) = middle;
  }
  AttentionSequence sequence;
  sequence.take(p, head * p.n_sequences + at, p.H);
  if (round >= sequence.rounds || !(sequence.rules || p.bucket_aligned)) return;

  const int place = row - sequence.offset, first = round * sequence.length, slot = first + place;
  Window window{};
  if (p.buckets) {
    const int32_t* buckets = p.buckets + (head * p.R + round) * p.L + sequence.offset;
    const auto bucket_of = [&](int in_round) { return buckets[sequence.position(first + in_round)]; };
    const int bucket = bucket_of(place);
    const auto first_where = [&](auto&& reached) {  // of the slots, which are sorted by bucket
      int low = 0, high = sequence.length;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (reached(bucket_of(middle)))
          high = middle;
        else
          low = middle + 1;
      }
      return first + low;
    };
    window.bucket = {first_where([&](int x) { return x >= bucket; }), first_where([&](int x) { return x > bucket; })};
  }
  window.seen = p.bucket_aligned ? AttentionSequence::around_in(window.bucket, slot, p.chunk_length, p.before, p.after)
                                 : sequence.around(p, slot, p.before, p.after);
  const int64_t to = (head * p.R + round) * p.L + sequence.offset + sequence.position(slot);
  p.places[to] = place;
  p.windows[to] = make_int4(window.seen.first, window.seen.behind, window.bucket.first, window.bucket.behind);
}

}  // namespace rk::cuda
