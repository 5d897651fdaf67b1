// Attention backward, without atomics: a task owns consecutive chunks, and recomputes the queries that see their keys.
//
// It goes through the query chunks whose windows touch its keys. The gradients of a key are collected in the buffers of
// its chunk until the last query chunk that sees it is done. Then they are added to the rows, once per round, together
// with the gradients of the row as a query.
#pragma once
#include "kernels/cpu/forward.h"

namespace rk::cpu::RK_ISA {

// The queries in rows [first, first + count) of a chunk.
template <class T>
struct QueryBlock {
  QueryChunk chunk;
  int count;
  int64_t padded;  // count in whole vectors
  const T* Q;      // [count][Dp]
  alignas(64) T lse[kQueries], delta[kQueries];
};

template <class T>
struct BackwardScratch {
  int64_t Dp, Ep;      // D and E, padded
  int64_t most_steps;  // the longest sum of a product
  std::vector<ChunkRows<T>> chunks;
  Buffer<T> Q, dO, QT, OT, P, S, bias, drop, dQ;
  QueryLimits<T> limits;
  ScoreModLanes<T> lanes;
  Prefetch prefetch;
  QueryBlock<T> queries;

  explicit BackwardScratch(const AttentionParams& p)
      : Dp(round_up(p.D, kRowPad)), Ep(round_up(p.E, kRowPad)), lanes(p) {
    const int64_t C = max_keys(p);
    chunks.resize(p.chunks_before + 1 + p.chunks_after);
    for (auto& c : chunks) c.resize(C, Dp, Ep, !p.lists());
    if (p.lists()) dQ.resize(kQueries * Dp);
    Q.resize(kQueries * Dp), dO.resize(kQueries * Ep), QT.resize(Dp * kQueries), OT.resize(Ep * kQueries);
    P.resize(C * kQueries), S.resize(C * kQueries), bias.resize(C * kQueries), drop.resize(C * kQueries);
    most_steps = std::max({Dp, Ep, C, int64_t{kQueries}});
  }
};

// Prepares a block of queries: gathers its rows and those of grad_out, transposes both, and finds what it may see.
// shared_rows: the rows of the chunk, which are queries and keys; or null.
template <class T>
void start_block(const AttentionParams& p, SequenceState<T>& state, BackwardScratch<T>& s, const QueryChunk& chunk,
                 const ChunkRows<T>* shared_rows, int first, int count) {
  const HeadSequence& seq = state.sequence;
  QueryBlock<T>& b = s.queries;
  const int n_queries = static_cast<int>(seq.n_queries);
  const int* position = chunk.position + first;
  b.chunk = {chunk.start, position, chunk.slot_in_chunk + first};
  b.count = count, b.padded = round_up(count, kLanes<T>);
  b.Q = shared_rows ? shared_rows->K + first * s.Dp : s.Q;
  if (!shared_rows) gather<T>(p.query, seq, seq.h, position, count, n_queries, p.D, s.Q, s.Dp);
  gather<T>(p.grad_out, seq, seq.h, position, count, n_queries, p.E, s.dO, s.Ep);
  transpose_rows<T>(b.Q, s.Dp, count, p.D, s.QT);
  transpose_rows<T>(s.dO, s.Ep, count, p.E, s.OT);
  s.limits.fill(p, seq, seq.round(chunk.start), position, count);
  state.score_mod->lanes(position, count, s.lanes);
  for (int l = 0; l < kQueries; ++l) {
    const bool real = l < count && position[l] < n_queries;
    b.lse[l] = real ? state.row_a[position[l]] : T(0);
    b.delta[l] = real ? state.row_b[position[l]] : T(0);
  }
}

// Where the gradients of a block go, and whether they are added there. Null: they are not wanted.
template <class T>
struct GradientRows {
  T* rows;
  bool add;
};

// Gradients of the block of queries in the scratch and of one chunk of its window.
template <class T>
void pair_gradients(const AttentionParams& p, SequenceState<T>& state, BackwardScratch<T>& s, const WindowChunk<T>& w,
                    GradientRows<T> dQ, GradientRows<T> dK, GradientRows<T> dV) {
  const HeadSequence& seq = state.sequence;
  const QueryBlock<T>& b = s.queries;
  const ChunkRows<T>& keys = *w.keys;
  const BlockMask<T> mask{s.limits, keys.key_position, keys.count};
  T *drop = nullptr, *bias = nullptr;
  if (p.dropout())
    dropout_block<T>(p, seq, b.chunk.start, b.chunk.slot_in_chunk, b.count, w.window_index, keys.row.data(), keys.count,
                     drop = s.drop);
  if (state.score_mod->any())
    state.score_mod->block(seq.round(b.chunk.start), b.chunk.position, b.count, b.padded, s.lanes, keys, w.chunk,
                           bias = s.bias);
  pair_block<T>(mask, keys.K, s.Dp, s.QT, b.padded, p.D, s.P, s.prefetch);
  pair_block<T>(mask, keys.V, s.Ep, s.OT, b.padded, p.E, s.S, s.prefetch);
  gradient_block<T>(mask, s.P, s.S, b.padded, keys.factor_log2, keys.factor, bias, drop, b.lse, b.delta);
  if (dV.rows) key_block<T>(mask, s.P, b.count, s.dO, s.Ep, dV.rows, dV.add, s.prefetch);
  if (dK.rows) key_block<T>(mask, s.S, b.count, b.Q, s.Dp, dK.rows, dK.add, s.prefetch);
  const Weighted<T> weighted{mask, s.S, keys.K};
  if (dQ.rows) query_block<T>(&weighted, 1, b.count, s.Dp, dQ.rows, dQ.add, s.prefetch);
}

// The task that owns the chunks [begin, end) of a sequence.
template <class T>
class BackwardWalk {
 public:
  BackwardWalk(const AttentionParams& p, SequenceState<T>& state, BackwardScratch<T>& s, int64_t begin, int64_t end)
      : p_(p), seq_(state.sequence), state_(state), s_(s), n_queries_(static_cast<int>(seq_.n_queries)) {
    const int64_t n = seq_.n_chunks();
    const int64_t shift = seq_.wraps ? n * ((seq_.before + seq_.after) / n + 1) : 0;  // makes unrolled indices positive
    begin_ = begin + shift, end_ = end + shift;
  }

  void run() {
    for (auto& c : s_.chunks) c.index = std::numeric_limits<int64_t>::min();
    for (int64_t q = begin_ - seq_.after; q < end_ + seq_.before; ++q) {
      if (const int chunk = seq_.chunk_at(q, q); chunk >= 0) query_chunk(q, seq_.chunks[chunk]);
      if (const int64_t done = q - seq_.before; owned(done))
        flush(s_.chunks[done % s_.chunks.size()], seq_.chunk_at(done, done));
    }
  }

 private:
  bool owned(int64_t index) const { return index >= begin_ && index < end_; }

  ChunkRows<T>& rows_of(int64_t index, int chunk) {
    ChunkRows<T>& rows = s_.chunks[index % s_.chunks.size()];
    if (rows.index != index) rows.load(p_, seq_, index, chunk, s_.Dp, s_.Ep);
    return rows;
  }

  void query_chunk(int64_t q, Chunk chunk) {
    bool needed = owned(q);
    for (int o = -seq_.before; o <= seq_.after; ++o) needed |= owned(q + o) && seq_.chunk_at(q + o, q) >= 0;
    if (!needed) return;
    prefetch(q);
    for (int block = 0; block < chunk.count; block += kQueries)
      query_block_at(q, chunk, block, std::min(kQueries, chunk.count - block));
  }

  void prefetch(int64_t q) {
    s_.prefetch.clear();
    if (const int next = seq_.chunk_at(q + 1, q + 1); next >= 0 && q + 1 < end_ + seq_.before) {
      const Chunk c = seq_.chunks[next];
      const int length = static_cast<int>(seq_.L);
      s_.prefetch.template add<T>(p_.query, seq_, seq_.h, seq_.order, c.start, c.count, length, p_.D);
      s_.prefetch.template add<T>(p_.value, seq_, seq_.key_head, seq_.order, c.start, c.count, length, p_.E);
      s_.prefetch.template add<T>(p_.grad_out, seq_, seq_.h, seq_.order, c.start, c.count, n_queries_, p_.E);
    }
    if (owned(q - seq_.before)) {  // these rows will be added to next
      const Chunk c = seq_.chunks[seq_.chunk_at(q - seq_.before, q - seq_.before)];
      s_.prefetch.template add<T>(p_.grad_query, seq_, seq_.h, seq_.order, c.start, c.count, static_cast<int>(seq_.L),
                                  p_.D);
      s_.prefetch.template add<T>(p_.grad_value, seq_, seq_.key_head, seq_.order, c.start, c.count,
                                  static_cast<int>(seq_.L), p_.E);
    }
    s_.prefetch.ready(s_.most_steps);
  }

  void query_block_at(int64_t q, Chunk chunk, int block, int count) {
    ChunkRows<T>& own = rows_of(q, seq_.chunk_at(q, q));
    const QueryChunk queries{chunk.start, own.position.data(), own.slot_in_chunk.data()};
    start_block<T>(p_, state_, s_, queries, p_.shared_qk() ? &own : nullptr, block, count);
    bool first_keys = true;
    int64_t window_index = 0;
    for (int o = -seq_.before; o <= seq_.after; ++o) {
      const int k = seq_.chunk_at(q + o, q);
      if (k < 0) continue;
      if (owned(q) || owned(q + o)) {
        ChunkRows<T>& keys = rows_of(q + o, k);
        const auto of_key = [&](T* rows) { return GradientRows<T>{owned(q + o) ? rows : nullptr, !keys.fresh}; };
        pair_gradients<T>(p_, state_, s_, {&keys, k, window_index},
                          {owned(q) ? own.dQ + block * s_.Dp : nullptr, !first_keys}, of_key(keys.dK), of_key(keys.dV));
        if (owned(q + o)) keys.fresh = false;
        first_keys = false;
      }
      window_index += seq_.chunks[k].count;
    }
  }

  // Adds the gradients of a finished chunk to its rows. Every row is in one chunk of each round.
  void flush(ChunkRows<T>& rows, int chunk) {
    const bool first = seq_.round(seq_.chunks[chunk].start) == 0;
    const bool first_of_key = first && seq_.h % p_.group() == 0;  // the other query heads of the key head add to it
    for (int i = 0; i < rows.count; ++i) {
      const int64_t l = seq_.offset + rows.position[i];
      T *dQ = rows.dQ + i * s_.Dp, *dK = rows.dK + i * s_.Dp;
      if (p_.shared_qk()) {  // the row is query and key; dK goes through the Jacobian of the unit key
        const T* k = rows.K + i * s_.Dp;
        Vec<T> dot{};
        for (int64_t d = 0; d < s_.Dp; d += kLanes<T>) dot += load<T>(dK + d) * load<T>(k + d);
        const Vec<T> along = splat(sum<T>(dot) * rows.square[i]);
        for (int64_t d = 0; d < s_.Dp; d += kLanes<T>)
          store<T>(dQ + d, load<T>(dQ + d) + (load<T>(dK + d) - load<T>(k + d) * along));
      } else {
        merge_row<T>(p_.grad_key.at<T>(seq_.b, seq_.key_head, l), dK, p_.D, first_of_key, T(1), T(1));
      }
      merge_row<T>(p_.grad_query.at<T>(seq_.b, seq_.h, l), dQ, p_.D, first, T(1), T(1));
      merge_row<T>(p_.grad_value.at<T>(seq_.b, seq_.key_head, l), rows.dV + i * s_.Ep, p_.E, first_of_key, T(1), T(1));
    }
  }

  const AttentionParams& p_;
  const HeadSequence& seq_;
  SequenceState<T>& state_;
  BackwardScratch<T>& s_;
  const int n_queries_;
  int64_t begin_, end_;
};

// row_a = lse base 2. row_b = delta = rowsum(dO O).
template <class T>
void backward_rows(const AttentionParams& p, SequenceState<T>& state, int64_t begin, int64_t end) {
  const HeadSequence& seq = state.sequence;
  const T* lse = static_cast<const T*>(p.lse) + (seq.b * p.H + seq.h) * p.n_queries + seq.offset;
  for (int64_t i = begin; i < end; ++i) {
    state.row_a[i] = std::max(lse[i] * static_cast<T>(kLog2e), kLowest<T>);  // lse is -infinity where nothing was seen
    state.row_b[i] =
        dot<T>(p.out.at<T>(seq.b, seq.h, seq.offset + i), p.grad_out.at<T>(seq.b, seq.h, seq.offset + i), p.E);
  }
}

// Gradients of self_only queries: of their value alone. Those of their equal scores sum to zero.
template <class T>
void backward_self_only(const AttentionParams& p, SequenceState<T>& state) {
  const HeadSequence& seq = state.sequence;
  const bool* self_only = p.self_only + (seq.b * p.H + seq.h) * p.n_queries + seq.offset;
  const int64_t n = seq.n_queries;
  if (std::none_of(self_only, self_only + n, [](bool x) { return x; })) return;
  T *weight = state.row_a, *times = state.row_b;
  std::fill(weight, weight + n, p.dropout() ? T(0) : T(1));
  std::fill(times, times + n, p.dropout() ? T(0) : T(1));
  if (p.dropout())
    visit_self_only<T>(p, seq, *state.score_mod, self_only, [&](int i, T w, int t) { weight[i] += w, times[i] += t; });
  for (int64_t i = 0; i < n; ++i) {
    if (!self_only[i]) continue;
    const T* g = p.grad_out.at<T>(seq.b, seq.h, seq.offset + i);
    T* to = p.grad_value.at<T>(seq.b, seq.h, seq.offset + i);
    for (int64_t e = 0; e < p.E; ++e) to[e] += g[e] * (weight[i] / times[i]);
  }
}

// Runs gradients(p, state, parallel) for every sequence of every head, with what all backwards do before and after.
template <class T, class F>
void for_each_backward(const AttentionParams& given, const Threads& threads, F&& gradients) {
  using Scratch = BackwardScratch<T>;
  for_each_head_sequence<T, Scratch>(given, threads, [&](SequenceState<T>& state, auto&& parallel) {
    const HeadSequence& seq = state.sequence;
    const auto written = {kGradQuery, kGradKey, kGradValue};
    const AttentionParams p =
        state.half.widen(given, seq, {kQueryRows, kKeyRows, kValueRows, kOutRows, kGradOut}, written, parallel);
    parallel(0, seq.n_queries, [&](Scratch&, int64_t begin, int64_t end) { backward_rows<T>(p, state, begin, end); });
    gradients(p, state, parallel);
    state.half.narrow(given, p, seq, written, parallel);
  });
}

template <class T>
void attention_backward(const AttentionParams& given, const Threads& threads) {
  for_each_backward<T>(given, threads, [](const AttentionParams& p, SequenceState<T>& state, auto&& parallel) {
    const HeadSequence& seq = state.sequence;
    for (int r = 0; r < seq.R; ++r)
      parallel(seq.round_begin[r], seq.round_begin[r + 1], [&](BackwardScratch<T>& s, int64_t begin, int64_t end) {
        BackwardWalk<T>(p, state, s, begin, end).run();
      });
    if (p.shared_qk()) backward_self_only<T>(p, state);
  });
}

}  // namespace rk::cpu::RK_ISA
