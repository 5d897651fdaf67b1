// The score_mod: what the rules within_bucket and dedup add to the score of a query and a key.
#pragma once
#include "kernels/cuda/attention_sequence.cuh"

namespace rk::cuda {

// How often a query meets a key in all rounds. query, key: rows of the sequence.
__device__ inline int times_met(const AttentionArguments& p, const HeadSequence& sequence, int query, int key) {
  int times = 0;
  for (int round = 0; round < sequence.rounds; ++round) {
    const Window window = sequence.window_of(p, round, query);
    // Each unrolled round that the window touches has the key once.
    int unrolled = floor_div(window.seen.begin, sequence.length);
    for (; unrolled * sequence.length < window.seen.end; ++unrolled) {
      const int key_round = unrolled - floor_div(unrolled, sequence.rounds) * sequence.rounds;
      const int in_round = sequence.slot_of_position[int64_t{key_round} * p.L + key];
      const int slot = key_round * sequence.length + in_round, at = unrolled * sequence.length + in_round;
      const bool same_bucket = slot >= window.bucket.begin && slot < window.bucket.end;
      times += at >= window.seen.begin && at < window.seen.end && (same_bucket || !p.has(kWithinBucket));
    }
  }
  return times;
}

// What is added to the score of a query and a key, base 2. -infinity masks the pair.
__device__ inline float score_mod(const AttentionArguments& p, const HeadSequence& sequence, int query, int key,
                                  int query_slot, int key_slot) {
  if (query == kNone) return 0.f;
  if (p.has(kWithinBucket)) {
    const Range bucket = sequence.window_of(p, sequence.wrapped(query_slot) / sequence.length, query).bucket;
    const int slot = sequence.wrapped(key_slot);
    if (slot < bucket.begin || slot >= bucket.end) return -INFINITY;
  }
  return p.has(kDedup) ? -log2f(static_cast<float>(max(times_met(p, sequence, query, key), 1))) : 0.f;
}

// Finds the slot of every position in every round, and its window. One thread for each of [B, H, R, L].
__global__ void __launch_bounds__(kAttentionThreads)
    attention_windows_kernel(const __grid_constant__ AttentionArguments p) {
  const int64_t number = int64_t{blockIdx.x} * kAttentionThreads + threadIdx.x;
  const int64_t head = number / p.L / p.R;
  if (head >= p.heads) return;
  const int round = static_cast<int>(number / p.L % p.R), row = static_cast<int>(number % p.L);
  const int32_t* bounds = p.cu_seqlens + head / p.H * p.bounds_stride;  // read only if there are several sequences
  int64_t at = 0;  // the last sequence that begins at or before the row
  for (int64_t end = p.n_sequences; end - at > 1;) {
    const int64_t middle = (at + end) / 2;
    (bounds[middle] <= row ? at : end) = middle;
  }
  HeadSequence sequence;
  sequence.take(p, head * p.n_sequences + at, p.H);
  if (round >= sequence.rounds || !(sequence.has_score_mod || p.has(kBucketAligned))) return;

  const int in_round = row - sequence.offset, first = round * sequence.length, slot = first + in_round;
  Window window{};
  if (p.buckets) {
    const int32_t* buckets = p.buckets + (head * p.R + round) * p.L + sequence.offset;
    const auto bucket_of = [&](int i) { return buckets[sequence.position(first + i)]; };
    const int bucket = bucket_of(in_round);
    const auto first_where = [&](auto&& reached) {  // slots are sorted by bucket
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
  window.seen = p.has(kBucketAligned) ? HeadSequence::around_in(window.bucket, slot, p.chunk_length, p.before, p.after)
                                      : sequence.around(p, slot, p.before, p.after);
  const int64_t to = (head * p.R + round) * p.L + sequence.offset + sequence.position(slot);
  p.slot_of_position[to] = in_round;
  p.windows[to] = make_int4(window.seen.begin, window.seen.end, window.bucket.begin, window.bucket.end);
}

}  // namespace rk::cuda
