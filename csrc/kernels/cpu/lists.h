// Attention of chunks of queries to lists of keys, see AttentionParams::key_indices.
//
// Who sees a key is no range here. So backward writes the gradients of every place of the lists of some chunks, sorts
// the places by key, and adds them up in that order: without atomics, and the same for any number of threads.
#pragma once

namespace rk::cpu::RK_ISA {

// The positions of a chunk's queries, and that they lie in order.
class ListQueries {
 public:
  QueryChunk of(const Unit& u, Chunk chunk) {
    position_.resize(chunk.count), place_.resize(chunk.count);
    for (int i = 0; i < chunk.count; ++i) position_[i] = u.position(chunk.start + i), place_[i] = i;
    return {chunk.start, position_.data(), place_.data()};
  }

 private:
  std::vector<int> position_, place_;
};

// How many keys of the list each query sees, in `seen`: set by the first round, increased by the others.
template <class T>
void count_seen(const AttentionParams& p, const Unit& u, const ChunkRows<T>& keys, const QueryChunk& queries, int count,
                T* seen) {
  const int round = u.round(queries.start);
  const Int<T>*end = keys.key_position + keys.count, *begin = keys.key_position;
  while (begin < end && *begin == kEveryone<T>) ++begin;  // the context is never unseen
  for (int i = 0; i < count; ++i) {
    const int position = queries.position[i], limit = p.has(kCausal) ? position + 1 : std::numeric_limits<int>::max();
    auto below = [&](int x) { return std::lower_bound(begin, end, std::min(x, limit)) - begin; };
    int64_t n = below(limit);
    if (round > 0) {
      const Range hidden = u.local[position / p.chunk_length];
      n -= below(hidden.to) - below(hidden.from);
    }
    seen[position] = static_cast<T>(n) + (round > 0 ? seen[position] : T(0));
  }
}

template <class T>
void prefetch_list(const AttentionParams& p, const Unit& u, int64_t chunk, Prefetch& prefetch) {
  const int32_t* list = key_list(p, u, chunk);
  int count = 0;
  while (count < p.list_length && list[count] >= 0) ++count;
  const int limit = static_cast<int>(p.S);
  prefetch.add<T>(p.key, u, u.key_head, list, 0, count, limit, p.D);
  prefetch.add<T>(p.value, u, u.key_head, list, 0, count, limit, p.E);
}

// f(chunk, its queries, their number, its keys) for the chunks [begin, end); Scratch is that of forward or backward.
template <class T, class Scratch, class F>
void each_list(const AttentionParams& p, Shared<T>& shared, Scratch& s, int64_t begin, int64_t end, F&& f) {
  const Unit& u = shared.unit;
  ChunkRows<T>& keys = s.chunks[0];
  ListQueries queries;
  for (int64_t c = begin; c < end; ++c) {
    const int count = u.chunks[c].count;
    const QueryChunk q = queries.of(u, u.chunks[c]);
    keys.load_list(p, u, key_list(p, u, c), s.Dp, s.Ep);
    if (p.has(kRest)) count_seen<T>(p, u, keys, q, count, shared.lists.seen);
    s.prefetch.clear();
    if (c + 1 < end) prefetch_list<T>(p, u, c + 1, s.prefetch);
    s.prefetch.ready(s.most_steps);
    f(c, q, count, keys);
  }
}

template <class T>
void list_forward_chunks(const AttentionParams& p, Shared<T>& shared, ForwardScratch<T>& s, int64_t begin,
                         int64_t end) {
  each_list<T>(p, shared, s, begin, end, [&](int64_t c, const QueryChunk& q, int queries, ChunkRows<T>& keys) {
    s.window.assign(1, {&keys, static_cast<int>(c), 0});
    for (int block = 0; block < queries; block += kQueries)
      forward_block<T>(p, shared, s, q, nullptr, block, std::min(kQueries, queries - block));
  });
}

template <class T>
void list_forward(const AttentionParams& given, const Threads& threads) {
  for_each_unit<T, ForwardScratch<T>>(given, threads, [&](Shared<T>& shared, auto&& parallel) {
    const Unit& u = shared.unit;
    const AttentionParams p = shared.half.widen(given, u, {kQueryRows, kKeyRows, kValueRows}, {kOutRows}, parallel);
    shared.lists.seen.grow(p.L);
    for (int r = 0; r < u.R; ++r)
      parallel(u.round_begin[r], u.round_begin[r + 1], [&](ForwardScratch<T>& s, int64_t begin, int64_t end) {
        list_forward_chunks<T>(p, shared, s, begin, end);
      });
    if (p.has(kRest)) Rest<T>(p, shared).forward(parallel);
    shared.half.round(given, p, u, {kOutRows}, parallel);
  });
}

// The chunks [begin, end) of the part that starts at chunk `first`.
template <class T>
void list_backward_chunks(const AttentionParams& p, Shared<T>& shared, BackwardScratch<T>& s, int64_t first,
                          int64_t begin, int64_t end) {
  const Unit& u = shared.unit;
  each_list<T>(p, shared, s, begin, end, [&](int64_t c, const QueryChunk& q, int queries, ChunkRows<T>& keys) {
    const int64_t place = (c - first) * p.list_length;
    T *dK = shared.lists.dK + place * s.Dp, *dV = shared.lists.dV + place * s.Ep;
    for (int block = 0; block < queries; block += kQueries) {
      const int count = std::min(kQueries, queries - block);
      start_block<T>(p, shared, s, q, nullptr, block, count);
      pair_gradients<T>(p, shared, s, {&keys, static_cast<int>(c), 0}, {s.dQ, false}, {dK, block > 0}, {dV, block > 0});
      for (int i = 0; i < count; ++i)
        merge_row<T>(p.grad_query.at<T>(u.b, u.h, q.position[block + i]), s.dQ + i * s.Dp, p.D, u.round(q.start) == 0,
                     T(1), T(1));
    }
  });
}

// Adds the gradients of the places of the chunks [first, last) to their keys.
template <class T, class P>
void add_places(const AttentionParams& p, Shared<T>& shared, int64_t first, int64_t last, P&& parallel) {
  const Unit& u = shared.unit;
  ListState<T>& lists = shared.lists;
  const int32_t* list = key_list(p, u, first);
  const int64_t places = (last - first) * p.list_length;
  const int32_t none = static_cast<int32_t>(p.S);
  lists.keys.resize(places), lists.order.resize(places);
  for (int64_t begin = 0; begin < places; begin += p.list_length)
    for (int64_t i = 0, left = 1; i < p.list_length; ++i) {  // a list ends at its first -1
      left &= list[begin + i] >= 0;
      lists.keys[begin + i] = left ? list[begin + i] : none;
    }
  counting_sort(lists.keys.data(), places, p.S + 1, lists.order.data(), lists.scratch);
  parallel(0, p.S, [&](BackwardScratch<T>& s, int64_t begin, int64_t end) {
    const int32_t* key = lists.keys.data();
    auto at = std::partition_point(lists.order.begin(), lists.order.end(), [&](int32_t i) { return key[i] < begin; });
    for (; at != lists.order.end() && key[*at] < end; ++at) {
      const int64_t place = *at;
      add_row<T>(p.grad_key.at<T>(u.b, u.key_head, key[place]), lists.dK + place * s.Dp, p.D);
      add_row<T>(p.grad_value.at<T>(u.b, u.key_head, key[place]), lists.dV + place * s.Ep, p.E);
    }
  });
}

template <class T>
void list_backward(const AttentionParams& given, const Threads& threads) {
  using Scratch = BackwardScratch<T>;
  for_each_backward<T>(given, threads, [](const AttentionParams& p, Shared<T>& shared, auto&& parallel) {
    const Unit& u = shared.unit;
    if (u.h % p.group() == 0)
      parallel(0, p.S, [&](Scratch&, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          std::fill_n(p.grad_key.at<T>(u.b, u.key_head, i), p.D, T(0));
          std::fill_n(p.grad_value.at<T>(u.b, u.key_head, i), p.E, T(0));
        }
      });
    // So many chunks at a time that their places take about as much memory as the keys, and sorting them is little
    // work.
    const int64_t part = std::max<int64_t>(64, p.S / p.list_length + 1);
    const int64_t places = std::min<int64_t>(part, u.n_chunks()) * p.list_length;
    shared.lists.seen.grow(p.L);
    shared.lists.dK.grow(places * round_up(p.D, kRowPad)), shared.lists.dV.grow(places * round_up(p.E, kRowPad));
    for (int r = 0; r < u.R; ++r)
      for (int64_t first = u.round_begin[r]; first < u.round_begin[r + 1]; first += part) {
        const int64_t last = std::min<int64_t>(first + part, u.round_begin[r + 1]);
        parallel(first, last, [&](Scratch& s, int64_t begin, int64_t end) {
          list_backward_chunks<T>(p, shared, s, first, begin, end);
        });
        add_places<T>(p, shared, first, last, parallel);
      }
    if (p.has(kRest)) Rest<T>(p, shared).backward(parallel);
  });
}

}  // namespace rk::cpu::RK_ISA
