// Attention backward, without atomics: a task owns consecutive chunks of keys and recomputes the queries that see them.
//
// It walks over the query chunks whose windows touch its keys. A key's gradients collect in the chunk's buffers until
// the last query chunk that sees it is done; then they are added to the rows, once per round, together with the
// query's.
#pragma once

namespace rk::cpu::RK_ISA {

template <class T>
struct BackwardScratch {
  int64_t Dp, Ep;      // D and E, padded
  int64_t most_steps;  // the longest sum of a product
  std::vector<ChunkRows<T>> chunks;
  Buffer<T> Q, dO, QT, OT, P, S, bias, drop;
  QueryRules<T> rules;
  PairLanes<T> lanes;
  Prefetch prefetch;

  explicit BackwardScratch(const AttentionParams& p)
      : Dp(round_up(p.D, kRowPad)), Ep(round_up(p.E, kRowPad)), lanes(p) {
    const int64_t C = max_chunk(p);
    chunks.resize(p.chunks_before + 1 + p.chunks_after);
    for (auto& c : chunks) c.resize(C, Dp, Ep, true);
    Q.resize(kQueries * Dp), dO.resize(kQueries * Ep), QT.resize(Dp * kQueries), OT.resize(Ep * kQueries);
    P.resize(C * kQueries), S.resize(C * kQueries), bias.resize(C * kQueries), drop.resize(C * kQueries);
    most_steps = std::max({Dp, Ep, C, int64_t{kQueries}});
  }
};

// Walks over the windows of one part of a unit: owns the chunks [begin, end).
template <class T>
class BackwardWalk {
 public:
  BackwardWalk(const AttentionParams& p, Shared<T>& shared, BackwardScratch<T>& s, int64_t begin, int64_t end)
      : p_(p), u_(shared.unit), shared_(shared), s_(s), n_queries_(static_cast<int>(p.n_queries - u_.offset)) {
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
      s_.prefetch.template add<T>(p_.query, u_, u_.order, c.start, c.count, length, p_.D);
      s_.prefetch.template add<T>(p_.value, u_, u_.order, c.start, c.count, length, p_.E);
      s_.prefetch.template add<T>(p_.grad_out, u_, u_.order, c.start, c.count, n_queries_, p_.E);
    }
    if (owned(q - u_.before)) {  // about to be added to
      const Chunk c = u_.chunks[u_.chunk_at(q - u_.before, q - u_.before)];
      s_.prefetch.template add<T>(p_.grad_query, u_, u_.order, c.start, c.count, static_cast<int>(u_.L), p_.D);
      s_.prefetch.template add<T>(p_.grad_value, u_, u_.order, c.start, c.count, static_cast<int>(u_.L), p_.E);
    }
    s_.prefetch.ready(s_.most_steps);
  }

  void query_block_at(int64_t q, Chunk chunk, int block, int count) {
    ChunkRows<T>& own = rows_of(q, u_.chunk_at(q, q));
    const int* position = own.position.data() + block;
    const int64_t queries = round_up(count, kLanes<T>);
    const T* Q = p_.shared() ? own.K + block * s_.Dp : s_.Q;
    if (!p_.shared()) gather<T>(p_.query, u_, position, count, n_queries_, p_.D, s_.Q, s_.Dp);
    gather<T>(p_.grad_out, u_, position, count, n_queries_, p_.E, s_.dO, s_.Ep);
    transpose_rows<T>(Q, s_.Dp, count, p_.D, s_.QT);
    transpose_rows<T>(s_.dO, s_.Ep, count, p_.E, s_.OT);
    s_.rules.fill(p_, u_, position, count);
    shared_.rules->lanes(position, count, s_.lanes);
    alignas(64) T lse[kQueries], delta[kQueries];
    for (int l = 0; l < kQueries; ++l) {
      const bool real = l < count && position[l] < n_queries_;
      lse[l] = real ? shared_.row_a[position[l]] : T(0);
      delta[l] = real ? shared_.row_b[position[l]] : T(0);
    }
    bool first_keys = true;
    int64_t place = 0;
    for (int o = -u_.before; o <= u_.after; ++o) {
      const int k = u_.chunk_at(q + o, q);
      if (k < 0) continue;
      if (!owned(q) && !owned(q + o)) {
        place += u_.chunks[k].count;
        continue;
      }
      ChunkRows<T>& keys = rows_of(q + o, k);
      const Sight<T> sight{s_.rules, keys.key_position, keys.count};
      T *drop = nullptr, *bias = nullptr;
      if (p_.dropout())
        dropout_block<T>(p_, u_, chunk.start, own.place.data() + block, count, place, keys.row.data(), keys.count,
                         drop = s_.drop);
      if (shared_.rules->any())
        shared_.rules->block(u_.round(chunk.start), position, count, queries, s_.lanes, keys, k, bias = s_.bias);
      pair_block<T>(sight, keys.K, s_.Dp, s_.QT, queries, p_.D, s_.P, s_.prefetch);
      pair_block<T>(sight, keys.V, s_.Ep, s_.OT, queries, p_.E, s_.S, s_.prefetch);
      gradient_block<T>(sight, s_.P, s_.S, queries, keys.factor_log2, keys.factor, bias, drop, lse, delta);
      if (owned(q + o)) {
        key_block<T>(sight, s_.P, count, s_.dO, s_.Ep, keys.dV, !keys.fresh, s_.prefetch);
        key_block<T>(sight, s_.S, count, Q, s_.Dp, keys.dK, !keys.fresh, s_.prefetch);
        keys.fresh = false;
      }
      if (owned(q)) {
        const Weighted<T> weighted{sight, s_.S, keys.K};
        query_block<T>(&weighted, 1, count, s_.Dp, own.dQ + block * s_.Dp, !first_keys, s_.prefetch);
        first_keys = false;
      }
      place += keys.count;
    }
  }

  // Adds the gradients of a finished chunk to its rows: each row stands once in every round.
  void flush(ChunkRows<T>& rows, int chunk) {
    const bool first = u_.round(u_.chunks[chunk].start) == 0;
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
        merge_row<T>(p_.grad_key.at<T>(u_.b, u_.h, l), dK, p_.D, first, T(1), T(1));
      }
      merge_row<T>(p_.grad_query.at<T>(u_.b, u_.h, l), dQ, p_.D, first, T(1), T(1));
      merge_row<T>(p_.grad_value.at<T>(u_.b, u_.h, l), rows.dV + i * s_.Ep, p_.E, first, T(1), T(1));
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
    const T *o = p.out.at<T>(u.b, u.h, u.offset + i), *g = p.grad_out.at<T>(u.b, u.h, u.offset + i);
    Vec<T> dot{};
    int64_t e = 0;
    for (; e + kLanes<T> <= p.E; e += kLanes<T>) dot += load<T>(o + e) * load<T>(g + e);
    T delta = sum<T>(dot);
    for (; e < p.E; ++e) delta += o[e] * g[e];
    shared.row_a[i] = std::max(lse[i] * static_cast<T>(kLog2e), kLowest<T>);  // -inf where nothing was seen
    shared.row_b[i] = delta;
  }
}

// The value of a query that saw only itself: its scores all have the same gradient, which sums to zero.
template <class T>
void backward_self_only(const AttentionParams& p, Shared<T>& shared) {
  const Unit& u = shared.unit;
  const bool* self_only = p.self_only + (u.b * p.H + u.h) * p.n_queries + u.offset;
  const int64_t n = std::min(u.L, p.n_queries - u.offset);
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

template <class T>
void attention_backward(const AttentionParams& given, const Threads& threads) {
  using Scratch = BackwardScratch<T>;
  for_each_unit<T, Scratch>(given, threads, [&](Shared<T>& shared, auto&& parallel) {
    const Unit& u = shared.unit;
    const auto gradients = {kGradQuery, kGradKey, kGradValue};
    const AttentionParams p =
        shared.half.widen(given, u, {kQueryRows, kKeyRows, kValueRows, kOutRows, kGradOut}, gradients, parallel);
    parallel(0, std::min(u.L, p.n_queries - u.offset),
             [&](Scratch&, int64_t begin, int64_t end) { backward_rows<T>(p, shared, begin, end); });
    for (int r = 0; r < u.R; ++r)
      parallel(u.round_begin[r], u.round_begin[r + 1],
               [&](Scratch& s, int64_t begin, int64_t end) { BackwardWalk<T>(p, shared, s, begin, end).run(); });
    if (p.shared()) backward_self_only<T>(p, shared);
    shared.half.round(given, p, u, gradients, parallel);
  });
}

}  // namespace rk::cpu::RK_ISA
