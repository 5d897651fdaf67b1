// Attention backward, without atomics: a task owns consecutive chunks of keys and recomputes the queries that see them.
//
// It walks over the query chunks whose windows touch its keys. A key's gradients collect in the chunk's buffers until
// the last query chunk that sees it is done; then they are added to the rows, once per round, together with the
// query's.
#pragma once

namespace rk::cpu::RK_ISA {

// The rows [first, first + count) of a chunk of queries.
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
  QueryRules<T> rules;
  PairLanes<T> lanes;
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

// Makes a block ready: its rows and theirs of the output's gradient, as they are and transposed, and what it may see.
// `own` are the chunk's rows where they are shared, or null.
template <class T>
void start_block(const AttentionParams& p, Shared<T>& shared, BackwardScratch<T>& s, const QueryChunk& chunk,
                 const ChunkRows<T>* own, int first, int count) {
  const Unit& u = shared.unit;
  QueryBlock<T>& b = s.queries;
  const int n_queries = static_cast<int>(u.n_queries);
  const int* position = chunk.position + first;
  b.chunk = {chunk.start, position, chunk.place + first};
  b.count = count, b.padded = round_up(count, kLanes<T>);
  b.Q = own ? own->K + first * s.Dp : s.Q;
  if (!own) gather<T>(p.query, u, u.h, position, count, n_queries, p.D, s.Q, s.Dp);
  gather<T>(p.grad_out, u, u.h, position, count, n_queries, p.E, s.dO, s.Ep);
  transpose_rows<T>(b.Q, s.Dp, count, p.D, s.QT);
  transpose_rows<T>(s.dO, s.Ep, count, p.E, s.OT);
  s.rules.fill(p, u, u.round(chunk.start), position, count);
  shared.rules->lanes(position, count, s.lanes);
  for (int l = 0; l < kQueries; ++l) {
    const bool real = l < count && position[l] < n_queries;
    b.lse[l] = real ? shared.row_a[position[l]] : T(0);
    b.delta[l] = real ? shared.row_b[position[l]] : T(0);
  }
}

// Where a block's gradients go, and whether they are added to what is there; null: nowhere.
template <class T>
struct GradientRows {
  T* rows;
  bool add;
};

// The gradients of the block of queries in the scratch and of one chunk of its window.
template <class T>
void pair_gradients(const AttentionParams& p, Shared<T>& shared, BackwardScratch<T>& s, const WindowChunk<T>& w,
                    GradientRows<T> dQ, GradientRows<T> dK, GradientRows<T> dV) {
  const Unit& u = shared.unit;
  const QueryBlock<T>& b = s.queries;
  const ChunkRows<T>& keys = *w.keys;
  const Sight<T> sight{s.rules, keys.key_position, keys.count};
  T *drop = nullptr, *bias = nullptr;
  if (p.dropout())
    dropout_block<T>(p, u, b.chunk.start, b.chunk.place, b.count, w.place, keys.row.data(), keys.count, drop = s.drop);
  if (shared.rules->any())
    shared.rules->block(u.round(b.chunk.start), b.chunk.position, b.count, b.padded, s.lanes, keys, w.chunk,
                        bias = s.bias);
  pair_block<T>(sight, keys.K, s.Dp, s.QT, b.padded, p.D, s.P, s.prefetch);
  pair_block<T>(sight, keys.V, s.Ep, s.OT, b.padded, p.E, s.S, s.prefetch);
  gradient_block<T>(sight, s.P, s.S, b.padded, keys.factor_log2, keys.factor, bias, drop, b.lse, b.delta);
  if (dV.rows) key_block<T>(sight, s.P, b.count, s.dO, s.Ep, dV.rows, dV.add, s.prefetch);
  if (dK.rows) key_block<T>(sight, s.S, b.count, b.Q, s.Dp, dK.rows, dK.add, s.prefetch);
  const Weighted<T> weighted{sight, s.S, keys.K};
  if (dQ.rows) query_block<T>(&weighted, 1, b.count, s.Dp, dQ.rows, dQ.add, s.prefetch);
}

// Walks over the windows of one part of a unit: owns the chunks [begin, end).
template <class T>
class BackwardWalk {
 public:
  BackwardWalk(const AttentionParams& p, Shared<T>& shared, BackwardScratch<T>& s, int64_t begin, int64_t end)
      : p_(p), u_(shared.unit), shared_(shared), s_(s), n_queries_(static_cast<int>(u_.n_queries)) {
    const int64_t n = u_.n_chunks();
    const int64_t turn = u_.ring ? n * ((u_.before + u_.after) / n + 1) : 0;  // keeps unrolled indices positive
    begin_ = begin + turn, end_ = end + turn;
  }

  void run() {
    for (auto& c : s_.chunks) c.index = std::numeric_limits<int64_t>::min();
    for (int64_t q = begin_ - u_.after; q < end_ + u_.before; ++q) {
      if (const int chunk = u_.chunk_at(q, q); chunk >= 0) query_chunk(q, u_.chunks[chunk]);
      if (const int64_t done = q - u_.before; owned(done))
        flush(s_.chunks[done % s_.chunks.size()], u_.chunk_at(done, done));
    }
  }

 private:
  bool owned(int64_t index) const { return index >= begin_ && index < end_; }

  ChunkRows<T>& rows_of(int64_t index, int chunk) {
    ChunkRows<T>& rows = s_.chunks[index % s_.chunks.size()];
    if (rows.index != index) rows.load(p_, u_, index, chunk, s_.Dp, s_.Ep);
    return rows;
  }

  void query_chunk(int64_t q, Chunk chunk) {
    bool needed = owned(q);
    for (int o = -u_.before; o <= u_.after; ++o) needed |= owned(q + o) && u_.chunk_at(q + o, q) >= 0;
    if (!needed) return;
    prefetch(q);
    for (int block = 0; block < chunk.count; block += kQueries)
      query_block_at(q, chunk, block, std::min(kQueries, chunk.count - block));
  }

  void prefetch(int64_t q) {
    s_.prefetch.clear();
    if (const int next = u_.chunk_at(q + 1, q + 1); next >= 0 && q + 1 < end_ + u_.before) {
      const Chunk c = u_.chunks[next];
      const int length = static_cast<int>(u_.L);
      s_.prefetch.template add<T>(p_.query, u_, u_.h, u_.order, c.start, c.count, length, p_.D);
      s_.prefetch.template add<T>(p_.value, u_, u_.key_head, u_.order, c.start, c.count, length, p_.E);
      s_.prefetch.template add<T>(p_.grad_out, u_, u_.h, u_.order, c.start, c.count, n_queries_, p_.E);
    }
    if (owned(q - u_.before)) {  // about to be added to
      const Chunk c = u_.chunks[u_.chunk_at(q - u_.before, q - u_.before)];
      s_.prefetch.template add<T>(p_.grad_query, u_, u_.h, u_.order, c.start, c.count, static_cast<int>(u_.L), p_.D);
      s_.prefetch.template add<T>(p_.grad_value, u_, u_.key_head, u_.order, c.start, c.count, static_cast<int>(u_.L),
                                  p_.E);
    }
    s_.prefetch.ready(s_.most_steps);
  }

  void query_block_at(int64_t q, Chunk chunk, int block, int count) {
    ChunkRows<T>& own = rows_of(q, u_.chunk_at(q, q));
    const QueryChunk queries{chunk.start, own.position.data(), own.place.data()};
    start_block<T>(p_, shared_, s_, queries, p_.shared() ? &own : nullptr, block, count);
    bool first_keys = true;
    int64_t place = 0;
    for (int o = -u_.before; o <= u_.after; ++o) {
      const int k = u_.chunk_at(q + o, q);
      if (k < 0) continue;
      if (owned(q) || owned(q + o)) {
        ChunkRows<T>& keys = rows_of(q + o, k);
        const auto of_key = [&](T* rows) { return GradientRows<T>{owned(q + o) ? rows : nullptr, !keys.fresh}; };
        pair_gradients<T>(p_, shared_, s_, {&keys, k, place},
                          {owned(q) ? own.dQ + block * s_.Dp : nullptr, !first_keys}, of_key(keys.dK), of_key(keys.dV));
        if (owned(q + o)) keys.fresh = false;
        first_keys = false;
      }
      place += u_.chunks[k].count;
    }
  }

  // Adds the gradients of a finished chunk to its rows: each row stands once in every round.
  void flush(ChunkRows<T>& rows, int chunk) {
    const bool first = u_.round(u_.chunks[chunk].start) == 0;
    const bool first_of_key = first && u_.h % p_.group() == 0;  // its other query heads add to it
    for (int i = 0; i < rows.count; ++i) {
      const int64_t l = u_.offset + rows.position[i];
      T *dQ = rows.dQ + i * s_.Dp, *dK = rows.dK + i * s_.Dp;
      if (p_.shared()) {  // both roles of the row; dK through the Jacobian of the unit key
        const T* k = rows.K + i * s_.Dp;
        Vec<T> dot{};
        for (int64_t d = 0; d < s_.Dp; d += kLanes<T>) dot += load<T>(dK + d) * load<T>(k + d);
        const Vec<T> along = splat(sum<T>(dot) * rows.square[i]);
        for (int64_t d = 0; d < s_.Dp; d += kLanes<T>)
          store<T>(dQ + d, load<T>(dQ + d) + (load<T>(dK + d) - load<T>(k + d) * along));
      } else {
        merge_row<T>(p_.grad_key.at<T>(u_.b, u_.key_head, l), dK, p_.D, first_of_key, T(1), T(1));
      }
      merge_row<T>(p_.grad_query.at<T>(u_.b, u_.h, l), dQ, p_.D, first, T(1), T(1));
      merge_row<T>(p_.grad_value.at<T>(u_.b, u_.key_head, l), rows.dV + i * s_.Ep, p_.E, first_of_key, T(1), T(1));
    }
  }

  const AttentionParams& p_;
  const Unit& u_;
  Shared<T>& shared_;
  BackwardScratch<T>& s_;
  const int n_queries_;
  int64_t begin_, end_;
};

// row_a = logsumexp in units of log 2, row_b = delta = rowsum(dO O).
template <class T>
void backward_rows(const AttentionParams& p, Shared<T>& shared, int64_t begin, int64_t end) {
  const Unit& u = shared.unit;
  const T* lse = static_cast<const T*>(p.lse) + (u.b * p.H + u.h) * p.n_queries + u.offset;
  for (int64_t i = begin; i < end; ++i) {
    shared.row_a[i] = std::max(lse[i] * static_cast<T>(kLog2e), kLowest<T>);  // -inf where nothing was seen
    shared.row_b[i] = dot<T>(p.out.at<T>(u.b, u.h, u.offset + i), p.grad_out.at<T>(u.b, u.h, u.offset + i), p.E);
  }
}

// The value of a query that saw only itself: its scores all have the same gradient, which sums to zero.
template <class T>
void backward_self_only(const AttentionParams& p, Shared<T>& shared) {
  const Unit& u = shared.unit;
  const bool* self_only = p.self_only + (u.b * p.H + u.h) * p.n_queries + u.offset;
  const int64_t n = u.n_queries;
  if (std::none_of(self_only, self_only + n, [](bool x) { return x; })) return;
  T *weight = shared.row_a, *times = shared.row_b;
  std::fill(weight, weight + n, p.dropout() ? T(0) : T(1));
  std::fill(times, times + n, p.dropout() ? T(0) : T(1));
  if (p.dropout())
    visit_self_only<T>(p, u, *shared.rules, self_only, [&](int i, T w, int t) { weight[i] += w, times[i] += t; });
  for (int64_t i = 0; i < n; ++i) {
    if (!self_only[i]) continue;
    const T* g = p.grad_out.at<T>(u.b, u.h, u.offset + i);
    T* to = p.grad_value.at<T>(u.b, u.h, u.offset + i);
    for (int64_t e = 0; e < p.E; ++e) to[e] += g[e] * (weight[i] / times[i]);
  }
}

// gradients(p, shared, parallel) for every unit, between what all backwards begin and end with.
template <class T, class F>
void for_each_backward(const AttentionParams& given, const Threads& threads, F&& gradients) {
  using Scratch = BackwardScratch<T>;
  for_each_unit<T, Scratch>(given, threads, [&](Shared<T>& shared, auto&& parallel) {
    const Unit& u = shared.unit;
    const auto written = {kGradQuery, kGradKey, kGradValue};
    const AttentionParams p =
        shared.half.widen(given, u, {kQueryRows, kKeyRows, kValueRows, kOutRows, kGradOut}, written, parallel);
    parallel(0, u.n_queries, [&](Scratch&, int64_t begin, int64_t end) { backward_rows<T>(p, shared, begin, end); });
    gradients(p, shared, parallel);
    shared.half.round(given, p, u, written, parallel);
  });
}

template <class T>
void attention_backward(const AttentionParams& given, const Threads& threads) {
  for_each_backward<T>(given, threads, [](const AttentionParams& p, Shared<T>& shared, auto&& parallel) {
    const Unit& u = shared.unit;
    for (int r = 0; r < u.R; ++r)
      parallel(u.round_begin[r], u.round_begin[r + 1], [&](BackwardScratch<T>& s, int64_t begin, int64_t end) {
        BackwardWalk<T>(p, shared, s, begin, end).run();
      });
    if (p.shared()) backward_self_only<T>(p, shared);
  });
}

}  // namespace rk::cpu::RK_ISA
