// Attention forward: gather, scores, softmax and product of one chunk after the other, the rounds merged in place.
#pragma once

namespace rk::cpu::RK_ISA {

template <class T>
struct ForwardScratch {
  int64_t Dp, Ep;                    // D and E, padded
  int64_t most_steps;                // the longest sum of a product
  std::vector<ChunkRows<T>> chunks;  // the window of the current chunk: chunk i lies in place i modulo its size
  Buffer<T> Q, QT, S, O, bias, drop;
  std::vector<Weighted<T>> weighted;
  QueryRules<T> rules;
  PairLanes<T> lanes;
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

// The rows [block, block + count) of a chunk of queries; its window lies in the scratch. `own` are the chunk's rows
// where they are shared, or null.
template <class T>
void forward_block(const AttentionParams& p, Shared<T>& shared, ForwardScratch<T>& s, const QueryChunk& chunk,
                   const ChunkRows<T>* own, int block, int count) {
  const Unit& u = shared.unit;
  const int64_t queries = round_up(count, kLanes<T>);
  const int round = u.round(chunk.start);
  const bool first = round == 0, last = round == u.R - 1;
  const int n_queries = static_cast<int>(u.n_queries);
  const int *position = chunk.position + block, *place_of = chunk.place + block;
  const T* rows = s.Q;
  if (own)
    rows = own->K + block * s.Dp;
  else
    gather<T>(p.query, u, u.h, position, count, n_queries, p.D, s.Q, s.Dp);
  transpose_rows<T>(rows, s.Dp, count, p.D, s.QT);
  s.rules.fill(p, u, round, position, count);
  shared.rules->lanes(position, count, s.lanes);

  auto each_chunk = [&](auto&& f) {  // f(keys, their chunk, their first place in the window, what is seen of them)
    for (const WindowChunk<T>& w : s.window)
      f(*w.keys, w.chunk, w.place, Sight<T>{s.rules, w.keys->key_position, w.keys->count});
  };
  // The exponentials are taken of scores less a bound of them. Where nothing is known, or where it is so far above the
  // scores that they might vanish, it is their maximum, for which they are computed first. Each query decides by
  // itself, so that its result does not depend, in any bit, on queries that it does not see.
  alignas(64) T bound[kQueries], highest[kQueries], total[kQueries] = {}, multiplier[kQueries];
  const bool known = own && !shared.rules->any();
  bool bounded = known;
  for (int l = 0; l < kQueries; ++l) {
    bound[l] = known && l < count ? own->bound[block + l] : kLowest<T>;
    if (!(bound[l] <= kSafeBound<T>)) bound[l] = kLowest<T>, bounded = false;  // nor if it is NaN
  }
  std::fill(highest, highest + kQueries, kLowest<T>);
  auto products = [&](const ChunkRows<T>& keys, int64_t place, const Sight<T>& sight) {
    pair_block<T>(sight, keys.K, s.Dp, s.QT, queries, p.D, s.S + place * kQueries, s.prefetch);
  };
  if (!bounded)
    each_chunk([&](const ChunkRows<T>& keys, int k, int64_t place, const Sight<T>& sight) {
      products(keys, place, sight);
      const T* bias = nullptr;
      if (shared.rules->any())
        shared.rules->block(round, position, count, queries, s.lanes, keys, k, s.bias), bias = s.bias;
      score_block<T>(sight, s.S + place * kQueries, queries, keys.factor_log2, bias, highest);
    });
  T *row_max = shared.row_a, *row_sum = shared.row_b;
  for (int l = 0; l < kQueries; ++l) {
    const T before = first || l >= count ? kLowest<T> : row_max[position[l]];
    highest[l] = std::max(bound[l] > kLowest<T> ? bound[l] : highest[l], before);
    multiplier[l] = before - highest[l];
  }
  for (int l = 0; l < kQueries; l += kLanes<T>) store<T>(multiplier + l, exp2(load<T>(multiplier + l)));
  s.weighted.clear();
  each_chunk([&](const ChunkRows<T>& keys, int, int64_t place, const Sight<T>& sight) {
    T *S = s.S + place * kQueries, *drop = nullptr;
    if (p.dropout())
      dropout_block<T>(p, u, chunk.start, place_of, count, place, keys.row.data(), keys.count, drop = s.drop);
    if (bounded) {
      products(keys, place, sight);
      weight_block<T, false>(sight, S, queries, keys.factor_log2, highest, total, drop);
    } else {
      weight_block<T, true>(sight, S, queries, nullptr, highest, total, drop);
    }
    s.weighted.push_back({sight, S, keys.V});
  });
  query_block<T>(s.weighted.data(), static_cast<int>(s.weighted.size()), count, s.Ep, s.O, false, s.prefetch);

  T* lse = static_cast<T*>(p.lse) + (u.b * p.H + u.h) * p.n_queries + u.offset;
  bool* self_only = p.self_only ? p.self_only + (u.b * p.H + u.h) * p.n_queries + u.offset : nullptr;
  for (int l = 0; l < count; ++l) {
    const int i = position[l];
    if (i >= n_queries) continue;
    const T sum = total[l] + (first ? T(0) : row_sum[i] * multiplier[l]);
    row_sum[i] = sum, row_max[i] = highest[l];
    const bool empty = sum <= 0;  // not if it is NaN
    const T inverse = !last ? T(1) : empty ? T(0) : 1 / sum;
    merge_row<T>(p.out.at<T>(u.b, u.h, u.offset + i), s.O + l * s.Ep, p.E, first, multiplier[l], inverse);
    if (!last) continue;
    lse[i] = empty ? -std::numeric_limits<T>::infinity() : static_cast<T>(highest[l] * kLn2 + std::log(sum));
    if (self_only) self_only[i] = empty && own_allowed<T>(p, u, *shared.rules, i);
  }
}

template <class T>
void forward_chunks(const AttentionParams& p, Shared<T>& shared, ForwardScratch<T>& s, int64_t begin, int64_t end) {
  const Unit& u = shared.unit;
  const int64_t turn = static_cast<int64_t>(u.n_chunks()) * (u.before / u.n_chunks() + 1);  // keeps indices positive
  for (auto& c : s.chunks) c.index = std::numeric_limits<int64_t>::min();
  const int n_queries = static_cast<int>(u.n_queries);
  for (int64_t c = begin; c < end; ++c) {
    const int64_t index = u.ring ? c + turn : c;
    s.window.clear();
    int64_t place = 0;
    for (int o = -u.before; o <= u.after; ++o) {
      const int k = u.chunk_at(index + o, index);
      if (k < 0) continue;
      ChunkRows<T>& rows = s.chunks[(index + o) % s.chunks.size()];
      if (rows.index != index + o) rows.load(p, u, index + o, k, s.Dp, s.Ep);
      s.window.push_back({&rows, k, place});
      place += rows.count;
    }
    const Chunk chunk = u.chunks[c];
    s.prefetch.clear();
    if (u.round(chunk.start) > 0)
      s.prefetch.template add<T>(p.out, u, u.h, u.order, chunk.start, chunk.count, n_queries, p.E);
    if (const int next = u.chunk_at(index + u.after + 1, index + u.after + 1); next >= 0 && c + 1 < end) {
      const Chunk ahead = u.chunks[next];
      const int length = static_cast<int>(u.L);
      s.prefetch.template add<T>(p.shared() ? p.query : p.key, u, u.key_head, u.order, ahead.start, ahead.count, length,
                                 p.D);
      s.prefetch.template add<T>(p.value, u, u.key_head, u.order, ahead.start, ahead.count, length, p.E);
    }
    s.prefetch.ready(s.most_steps);
    const ChunkRows<T>& own = s.chunks[index % s.chunks.size()];
    const QueryChunk queries{chunk.start, own.position.data(), own.place.data()};
    for (int block = 0; block < chunk.count; block += kQueries)
      forward_block<T>(p, shared, s, queries, p.shared() ? &own : nullptr, block,
                       std::min(kQueries, chunk.count - block));
  }
}

// Queries that saw nothing but themselves: their own value, and the logsumexp of their own score.
template <class T>
void finish_self_only(const AttentionParams& p, Shared<T>& shared) {
  const Unit& u = shared.unit;
  const int64_t head = (u.b * p.H + u.h) * p.n_queries + u.offset;
  const bool* self_only = p.self_only + head;
  T *lse = static_cast<T*>(p.lse) + head, *weight = shared.row_a, *times = shared.row_b;
  const int64_t n = u.n_queries;
  if (std::none_of(self_only, self_only + n, [](bool x) { return x; })) return;
  std::fill(weight, weight + n, T(0));
  std::fill(times, times + n, T(0));
  visit_self_only<T>(p, u, *shared.rules, self_only, [&](int i, T w, int t) { weight[i] += w, times[i] += t; });
  for (int64_t i = 0; i < n; ++i) {
    if (!self_only[i]) continue;
    const T* q = p.query.at<T>(u.b, u.h, u.offset + i);
    const T* v = p.value.at<T>(u.b, u.h, u.offset + i);
    T* out = p.out.at<T>(u.b, u.h, u.offset + i);
    T square = 0;
    for (int64_t d = 0; d < p.D; ++d) square += q[d] * q[d];
    const T norm = p.has(kL2Norm) ? std::max(std::sqrt(square), T(1e-12)) : std::sqrt(square + T(1e-6) * p.D);
    const T repeated = p.has(kDedup) ? T(0) : std::log(times[i]);
    lse[i] = static_cast<T>(p.scale) * square / norm + shared.rules->mask(i, i) + repeated;
    for (int64_t e = 0; e < p.E; ++e) out[e] = v[e] * (weight[i] / times[i]);
  }
}

template <class T>
void attention_forward(const AttentionParams& given, const Threads& threads) {
  for_each_unit<T, ForwardScratch<T>>(given, threads, [&](Shared<T>& shared, auto&& parallel) {
    const AttentionParams p =
        shared.half.widen(given, shared.unit, {kQueryRows, kKeyRows, kValueRows}, {kOutRows}, parallel);
    for (int r = 0; r < shared.unit.R; ++r)
      parallel(shared.unit.round_begin[r], shared.unit.round_begin[r + 1],
               [&](ForwardScratch<T>& s, int64_t begin, int64_t end) { forward_chunks<T>(p, shared, s, begin, end); });
    if (p.shared()) finish_self_only<T>(p, shared);
    shared.half.round(given, p, shared.unit, {kOutRows}, parallel);
  });
}

}  // namespace rk::cpu::RK_ISA
