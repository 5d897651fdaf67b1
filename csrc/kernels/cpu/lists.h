// Attention of chunks of queries to lists of keys, see AttentionParams::key_indices.
//
// The queries that see a key are no range here. So backward writes the gradients of every list entry of some chunks,
// sorts the entries by key, and adds them up in that order. This needs no atomics, and does not depend on the number of
// threads.
#pragma once
#include "kernels/cpu/backward.h"
#include "kernels/cpu/rest.h"

namespace rk::cpu::RK_ISA {

// The positions of a chunk's queries, which are not sorted again: row i is slot i.
class ListQueries {
 public:
  QueryChunk of(const HeadSequence& seq, Chunk chunk) {
    position_.resize(chunk.count), place_.resize(chunk.count);
    for (int i = 0; i < chunk.count; ++i) position_[i] = seq.position(chunk.start + i), place_[i] = i;
    return {chunk.start, position_.data(), place_.data()};
  }

 private:
  std::vector<int> position_, place_;
};

// Counts in `seen` how many keys of the list each query sees. The first round sets it, the second adds to it.
template <class T>
void count_seen(const AttentionParams& p, const HeadSequence& seq, const ChunkRows<T>& keys, const QueryChunk& queries,
                int count, T* seen) {
  const int round = seq.round(queries.start);
  const Int<T>*end = keys.key_position + keys.count, *begin = keys.key_position;
  while (begin < end && *begin == kContextKey<T>) ++begin;  // context keys do not count
  for (int i = 0; i < count; ++i) {
    const int position = queries.position[i], limit = p.has(kCausal) ? position + 1 : std::numeric_limits<int>::max();
    auto below = [&](int x) { return std::lower_bound(begin, end, std::min(x, limit)) - begin; };
    int64_t n = below(limit);
    if (round > 0) {
      const Range excluded = seq.excluded[position / p.chunk_length];
      n -= below(excluded.end) - below(excluded.begin);
    }
    seen[position] = static_cast<T>(n) + (round > 0 ? seen[position] : T(0));
  }
}

template <class T>
void prefetch_list(const AttentionParams& p, const HeadSequence& seq, int64_t chunk, Prefetch& prefetch) {
  const int32_t* list = key_list(p, seq, chunk);
  int count = 0;
  while (count < p.list_length && list[count] >= 0) ++count;
  const int limit = static_cast<int>(p.S);
  prefetch.add<T>(p.key, seq, seq.key_head, list, 0, count, limit, p.D);
  prefetch.add<T>(p.value, seq, seq.key_head, list, 0, count, limit, p.E);
}

// Calls f(chunk, queries, number of queries, keys) for the chunks [begin, end). Scratch: of forward or backward.
template <class T, class Scratch, class F>
void each_list(const AttentionParams& p, SequenceState<T>& state, Scratch& s, int64_t begin, int64_t end, F&& f) {
  const HeadSequence& seq = state.sequence;
  ChunkRows<T>& keys = s.chunks[0];
  ListQueries queries;
  for (int64_t c = begin; c < end; ++c) {
    const int count = seq.chunks[c].count;
    const QueryChunk q = queries.of(seq, seq.chunks[c]);
    keys.load_list(p, seq, key_list(p, seq, c), s.Dp, s.Ep);
    if (p.has(kRestKey)) count_seen<T>(p, seq, keys, q, count, state.lists.seen);
    s.prefetch.clear();
    if (c + 1 < end) prefetch_list<T>(p, seq, c + 1, s.prefetch);
    s.prefetch.ready(s.most_steps);
    f(c, q, count, keys);
  }
}

template <class T>
void list_forward_chunks(const AttentionParams& p, SequenceState<T>& state, ForwardScratch<T>& s, int64_t begin,
                         int64_t end) {
  each_list<T>(p, state, s, begin, end, [&](int64_t c, const QueryChunk& q, int queries, ChunkRows<T>& keys) {
    s.window.assign(1, {&keys, static_cast<int>(c), 0});
    for (int block = 0; block < queries; block += kQueries)
      forward_block<T>(p, state, s, q, nullptr, block, std::min(kQueries, queries - block));
  });
}

template <class T>
void list_forward(const AttentionParams& given, const Threads& threads) {
  for_each_head_sequence<T, ForwardScratch<T>>(given, threads, [&](SequenceState<T>& state, auto&& parallel) {
    const HeadSequence& seq = state.sequence;
    const AttentionParams p = state.half.widen(given, seq, {kQueryRows, kKeyRows, kValueRows}, {kOutRows}, parallel);
    state.lists.seen.grow(p.L);
    for (int r = 0; r < seq.R; ++r)
      parallel(seq.round_begin[r], seq.round_begin[r + 1], [&](ForwardScratch<T>& s, int64_t begin, int64_t end) {
        list_forward_chunks<T>(p, state, s, begin, end);
      });
    if (p.has(kRestKey)) RestKey<T>(p, state).forward(parallel);
    state.half.narrow(given, p, seq, {kOutRows}, parallel);
  });
}

// Gradients of the chunks [begin, end); entries are counted from those of chunk `first`.
template <class T>
void list_backward_chunks(const AttentionParams& p, SequenceState<T>& state, BackwardScratch<T>& s, int64_t first,
                          int64_t begin, int64_t end) {
  const HeadSequence& seq = state.sequence;
  each_list<T>(p, state, s, begin, end, [&](int64_t c, const QueryChunk& q, int queries, ChunkRows<T>& keys) {
    const int64_t entry = (c - first) * p.list_length;
    T *dK = state.lists.dK + entry * s.Dp, *dV = state.lists.dV + entry * s.Ep;
    for (int block = 0; block < queries; block += kQueries) {
      const int count = std::min(kQueries, queries - block);
      start_block<T>(p, state, s, q, nullptr, block, count);
      pair_gradients<T>(p, state, s, {&keys, static_cast<int>(c), 0}, {s.dQ, false}, {dK, block > 0}, {dV, block > 0});
      for (int i = 0; i < count; ++i)
        merge_row<T>(p.grad_query.at<T>(seq.b, seq.h, q.position[block + i]), s.dQ + i * s.Dp, p.D,
                     seq.round(q.start) == 0, T(1), T(1));
    }
  });
}

// Adds the gradients of the list entries of the chunks [first, last) to their keys.
template <class T, class P>
void add_entries(const AttentionParams& p, SequenceState<T>& state, int64_t first, int64_t last, P&& parallel) {
  const HeadSequence& seq = state.sequence;
  ListState<T>& lists = state.lists;
  const int32_t* list = key_list(p, seq, first);
  const int64_t entries = (last - first) * p.list_length;
  const int32_t none = static_cast<int32_t>(p.S);
  lists.keys.resize(entries), lists.order.resize(entries);
  for (int64_t begin = 0; begin < entries; begin += p.list_length)
    for (int64_t i = 0, left = 1; i < p.list_length; ++i) {  // a list ends at its first -1
      left &= list[begin + i] >= 0;
      lists.keys[begin + i] = left ? list[begin + i] : none;
    }
  counting_sort(lists.keys.data(), entries, p.S + 1, lists.order.data(), lists.scratch);
  parallel(0, p.S, [&](BackwardScratch<T>& s, int64_t begin, int64_t end) {
    const int32_t* key = lists.keys.data();
    auto at = std::partition_point(lists.order.begin(), lists.order.end(), [&](int32_t i) { return key[i] < begin; });
    for (; at != lists.order.end() && key[*at] < end; ++at) {
      const int64_t entry = *at;
      add_row<T>(p.grad_key.at<T>(seq.b, seq.key_head, key[entry]), lists.dK + entry * s.Dp, p.D);
      add_row<T>(p.grad_value.at<T>(seq.b, seq.key_head, key[entry]), lists.dV + entry * s.Ep, p.E);
    }
  });
}

template <class T>
void list_backward(const AttentionParams& given, const Threads& threads) {
  using Scratch = BackwardScratch<T>;
  for_each_backward<T>(given, threads, [](const AttentionParams& p, SequenceState<T>& state, auto&& parallel) {
    const HeadSequence& seq = state.sequence;
    if (seq.h % p.group() == 0)
      parallel(0, p.S, [&](Scratch&, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          std::fill_n(p.grad_key.at<T>(seq.b, seq.key_head, i), p.D, T(0));
          std::fill_n(p.grad_value.at<T>(seq.b, seq.key_head, i), p.E, T(0));
        }
      });
    // So many chunks at a time that their entries need about as much memory as the keys. Then sorting is little work.
    const int64_t part = std::max<int64_t>(64, p.S / p.list_length + 1);
    const int64_t entries = std::min<int64_t>(part, seq.n_chunks()) * p.list_length;
    state.lists.seen.grow(p.L);
    state.lists.dK.grow(entries * round_up(p.D, kRowPad)), state.lists.dV.grow(entries * round_up(p.E, kRowPad));
    for (int r = 0; r < seq.R; ++r)
      for (int64_t first = seq.round_begin[r]; first < seq.round_begin[r + 1]; first += part) {
        const int64_t last = std::min<int64_t>(first + part, seq.round_begin[r + 1]);
        parallel(first, last, [&](Scratch& s, int64_t begin, int64_t end) {
          list_backward_chunks<T>(p, state, s, first, begin, end);
        });
        add_entries<T>(p, state, first, last, parallel);
      }
    if (p.has(kRestKey)) RestKey<T>(p, state).backward(parallel);
  });
}

}  // namespace rk::cpu::RK_ISA
