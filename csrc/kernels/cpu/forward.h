// Attention forward: gather, scores, softmax and product of one chunk after the other. Rounds are merged in place.
#pragma once
#include "kernels/cpu/blocks.h"
#include "kernels/cpu/work.h"

namespace rk::cpu::RK_ISA {

template <class T>
struct ForwardScratch {
  int64_t Dp, Ep;                    // D and E, padded
  int64_t most_steps;                // the longest sum of a product
  std::vector<ChunkRows<T>> chunks;  // of the current window; chunk i is at index i modulo the size
  Buffer<T> Q, QT, S, O, bias, drop;
  std::vector<Weighted<T>> weighted;
  QueryLimits<T> limits;
  ScoreModLanes<T> lanes;
  Prefetch prefetch;
  std::vector<WindowChunk<T>> window;

  explicit ForwardScratch(const AttentionParams& p) : Dp(round_up(p.D, kRowPad)), Ep(round_up(p.E, kRowPad)), lanes(p) {
    const int64_t C = max_keys(p), window = p.chunks_before + 1 + p.chunks_after;
    chunks.resize(window);
    for (auto& c : chunks) c.resize(C, Dp, Ep, false);
    Q.resize(kQueries * Dp), QT.resize(Dp * kQueries), S.resize(window * C * kQueries), O.resize(kQueries * Ep);
    bias.resize(C * kQueries), drop.resize(C * kQueries);
    most_steps = std::max({Dp, Ep, C});
  }
};

// out = (out * multiplier + O) * inverse for one row.
template <class T>
RK_INLINE void merge_row(T* out, const T* O, int64_t E, bool first, T multiplier, T inverse) {
  const Vec<T> m = splat(multiplier), n = splat(inverse);
  int64_t e = 0;
  for (; e + kLanes<T> <= E; e += kLanes<T>) {
    Vec<T> x = load<T>(O + e);
    if (!first) x += load<T>(out + e) * m;
    store<T>(out + e, x * n);
  }
  for (; e < E; ++e) out[e] = (O[e] + (first ? T(0) : out[e] * multiplier)) * inverse;
}

// Attention of the queries in rows [block, block + count) of a chunk to the window in the scratch. shared_rows: the
// rows of the chunk, which are queries and keys; or null.
template <class T>
void forward_block(const AttentionParams& p, SequenceState<T>& state, ForwardScratch<T>& s, const QueryChunk& chunk,
                   const ChunkRows<T>* shared_rows, int block, int count) {
  const HeadSequence& seq = state.sequence;
  const int64_t queries = round_up(count, kLanes<T>);
  const int round = seq.round(chunk.start);
  const bool first = round == 0, last = round == seq.R - 1;
  const int n_queries = static_cast<int>(seq.n_queries);
  const int *position = chunk.position + block, *slot_in_chunk = chunk.slot_in_chunk + block;
  const T* rows = s.Q;
  if (shared_rows)
    rows = shared_rows->K + block * s.Dp;
  else
    gather<T>(p.query, seq, seq.h, position, count, n_queries, p.D, s.Q, s.Dp);
  transpose_rows<T>(rows, s.Dp, count, p.D, s.QT);
  s.limits.fill(p, seq, round, position, count);
  state.score_mod->lanes(position, count, s.lanes);

  auto each_chunk = [&](auto&& f) {  // f(keys, chunk, window index of the first key, mask)
    for (const WindowChunk<T>& w : s.window)
      f(*w.keys, w.chunk, w.window_index, BlockMask<T>{s.limits, w.keys->key_position, w.keys->count});
  };
  // Weights are exponentials of the scores minus an upper bound of the scores. If no bound is known, or it is so high
  // that weights could underflow, the bound is their maximum, and scores are computed first. Every query decides this
  // on its own, so that no bit of its result depends on other queries.
  alignas(64) T bound[kQueries], highest[kQueries], total[kQueries] = {}, multiplier[kQueries];
  const bool known = shared_rows && !state.score_mod->any();
  bool bounded = known;
  for (int l = 0; l < kQueries; ++l) {
    bound[l] = known && l < count ? shared_rows->bound[block + l] : kLowest<T>;
    if (!(bound[l] <= kSafeBound<T>)) bound[l] = kLowest<T>, bounded = false;  // also if it is NaN
  }
  std::fill(highest, highest + kQueries, kLowest<T>);
  auto products = [&](const ChunkRows<T>& keys, int64_t window_index, const BlockMask<T>& mask) {
    pair_block<T>(mask, keys.K, s.Dp, s.QT, queries, p.D, s.S + window_index * kQueries, s.prefetch);
  };
  if (!bounded)
    each_chunk([&](const ChunkRows<T>& keys, int k, int64_t window_index, const BlockMask<T>& mask) {
      products(keys, window_index, mask);
      const T* bias = nullptr;
      if (state.score_mod->any())
        state.score_mod->block(round, position, count, queries, s.lanes, keys, k, s.bias), bias = s.bias;
      score_block<T>(mask, s.S + window_index * kQueries, queries, keys.factor_log2, bias, highest);
    });
  T *row_max = state.row_a, *row_sum = state.row_b;
  for (int l = 0; l < kQueries; ++l) {
    const T before = first || l >= count ? kLowest<T> : row_max[position[l]];
    highest[l] = std::max(bound[l] > kLowest<T> ? bound[l] : highest[l], before);
    multiplier[l] = before - highest[l];
  }
  for (int l = 0; l < kQueries; l += kLanes<T>) store<T>(multiplier + l, exp2(load<T>(multiplier + l)));
  s.weighted.clear();
  each_chunk([&](const ChunkRows<T>& keys, int, int64_t window_index, const BlockMask<T>& mask) {
    T *S = s.S + window_index * kQueries, *drop = nullptr;
    if (p.dropout())
      dropout_block<T>(p, seq, chunk.start, slot_in_chunk, count, window_index, keys.row.data(), keys.count,
                       drop = s.drop);
    if (bounded) {
      products(keys, window_index, mask);
      weight_block<T, false>(mask, S, queries, keys.factor_log2, highest, total, drop);
    } else {
      weight_block<T, true>(mask, S, queries, nullptr, highest, total, drop);
    }
    s.weighted.push_back({mask, S, keys.V});
  });
  query_block<T>(s.weighted.data(), static_cast<int>(s.weighted.size()), count, s.Ep, s.O, false, s.prefetch);

  T* lse = static_cast<T*>(p.lse) + (seq.b * p.H + seq.h) * p.n_queries + seq.offset;
  bool* self_only = p.self_only ? p.self_only + (seq.b * p.H + seq.h) * p.n_queries + seq.offset : nullptr;
  for (int l = 0; l < count; ++l) {
    const int i = position[l];
    if (i >= n_queries) continue;
    const T sum = total[l] + (first ? T(0) : row_sum[i] * multiplier[l]);
    row_sum[i] = sum, row_max[i] = highest[l];
    const bool empty = sum <= 0;  // false if it is NaN
    const T inverse = !last ? T(1) : empty ? T(0) : 1 / sum;
    merge_row<T>(p.out.at<T>(seq.b, seq.h, seq.offset + i), s.O + l * s.Ep, p.E, first, multiplier[l], inverse);
    if (!last) continue;
    lse[i] = empty ? -std::numeric_limits<T>::infinity() : static_cast<T>(highest[l] * kLn2 + std::log(sum));
    if (self_only) self_only[i] = empty && self_allowed<T>(p, seq, *state.score_mod, i);
  }
}

template <class T>
void forward_chunks(const AttentionParams& p, SequenceState<T>& state, ForwardScratch<T>& s, int64_t begin,
                    int64_t end) {
  const HeadSequence& seq = state.sequence;
  const int64_t shift =
      static_cast<int64_t>(seq.n_chunks()) * (seq.before / seq.n_chunks() + 1);  // makes indices positive
  for (auto& c : s.chunks) c.index = std::numeric_limits<int64_t>::min();
  const int n_queries = static_cast<int>(seq.n_queries);
  for (int64_t c = begin; c < end; ++c) {
    const int64_t index = seq.wraps ? c + shift : c;
    s.window.clear();
    int64_t window_index = 0;
    for (int o = -seq.before; o <= seq.after; ++o) {
      const int k = seq.chunk_at(index + o, index);
      if (k < 0) continue;
      ChunkRows<T>& rows = s.chunks[(index + o) % s.chunks.size()];
      if (rows.index != index + o) rows.load(p, seq, index + o, k, s.Dp, s.Ep);
      s.window.push_back({&rows, k, window_index});
      window_index += rows.count;
    }
    const Chunk chunk = seq.chunks[c];
    s.prefetch.clear();
    if (seq.round(chunk.start) > 0)
      s.prefetch.template add<T>(p.out, seq, seq.h, seq.order, chunk.start, chunk.count, n_queries, p.E);
    if (const int next = seq.chunk_at(index + seq.after + 1, index + seq.after + 1); next >= 0 && c + 1 < end) {
      const Chunk ahead = seq.chunks[next];
      const int length = static_cast<int>(seq.L);
      s.prefetch.template add<T>(p.shared_qk() ? p.query : p.key, seq, seq.key_head, seq.order, ahead.start,
                                 ahead.count, length, p.D);
      s.prefetch.template add<T>(p.value, seq, seq.key_head, seq.order, ahead.start, ahead.count, length, p.E);
    }
    s.prefetch.ready(s.most_steps);
    const ChunkRows<T>& own = s.chunks[index % s.chunks.size()];
    const QueryChunk queries{chunk.start, own.position.data(), own.slot_in_chunk.data()};
    for (int block = 0; block < chunk.count; block += kQueries)
      forward_block<T>(p, state, s, queries, p.shared_qk() ? &own : nullptr, block,
                       std::min(kQueries, chunk.count - block));
  }
}

// Writes the result of self_only queries: their own value, and the logsumexp of their own score.
template <class T>
void finish_self_only(const AttentionParams& p, SequenceState<T>& state) {
  const HeadSequence& seq = state.sequence;
  const int64_t head = (seq.b * p.H + seq.h) * p.n_queries + seq.offset;
  const bool* self_only = p.self_only + head;
  T *lse = static_cast<T*>(p.lse) + head, *weight = state.row_a, *times = state.row_b;
  const int64_t n = seq.n_queries;
  if (std::none_of(self_only, self_only + n, [](bool x) { return x; })) return;
  std::fill(weight, weight + n, T(0));
  std::fill(times, times + n, T(0));
  visit_self_only<T>(p, seq, *state.score_mod, self_only, [&](int i, T w, int t) { weight[i] += w, times[i] += t; });
  for (int64_t i = 0; i < n; ++i) {
    if (!self_only[i]) continue;
    const T* q = p.query.at<T>(seq.b, seq.h, seq.offset + i);
    const T* v = p.value.at<T>(seq.b, seq.h, seq.offset + i);
    T* out = p.out.at<T>(seq.b, seq.h, seq.offset + i);
    T square = 0;
    for (int64_t d = 0; d < p.D; ++d) square += q[d] * q[d];
    const T norm = p.has(kL2Norm) ? std::max(std::sqrt(square), T(1e-12)) : std::sqrt(square + T(1e-6) * p.D);
    const T repeated = p.has(kDedup) ? T(0) : std::log(times[i]);
    lse[i] = static_cast<T>(p.scale) * square / norm + state.score_mod->mask(i, i) + repeated;
    for (int64_t e = 0; e < p.E; ++e) out[e] = v[e] * (weight[i] / times[i]);
  }
}

template <class T>
void attention_forward(const AttentionParams& given, const Threads& threads) {
  for_each_head_sequence<T, ForwardScratch<T>>(given, threads, [&](SequenceState<T>& state, auto&& parallel) {
    const AttentionParams p =
        state.half.widen(given, state.sequence, {kQueryRows, kKeyRows, kValueRows}, {kOutRows}, parallel);
    for (int r = 0; r < state.sequence.R; ++r)
      parallel(state.sequence.round_begin[r], state.sequence.round_begin[r + 1],
               [&](ForwardScratch<T>& s, int64_t begin, int64_t end) { forward_chunks<T>(p, state, s, begin, end); });
    if (p.shared_qk()) finish_self_only<T>(p, state);
    state.half.narrow(given, p, state.sequence, {kOutRows}, parallel);
  });
}

}  // namespace rk::cpu::RK_ISA
