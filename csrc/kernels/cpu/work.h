// What forward and backward share: rules of single pairs, and how units are spread over workers.
#pragma once

namespace rk::cpu::RK_ISA {

// What PairRules asks of the queries of a block, [R][64]: their buckets, chunks and segments in every round.
template <class T>
struct PairLanes {
  Buffer<Int<T>> bucket, chunk, segment;
  explicit PairLanes(const AttentionParams& p)
      : bucket(p.R * kQueries), chunk(p.R * kQueries), segment(p.R * kQueries) {}
};

// Rules that depend on the pair and not on positions alone: as a bias, -inf for a masked pair.
template <class T>
class PairRules {
 public:
  PairRules(const AttentionParams& p, const Unit& u, const std::vector<int32_t>& buckets)
      : p_(p), u_(u), buckets_(buckets) {
    within_ = p.has(kWithinBucket) && !buckets.empty();
    if (!p.has(kDedup)) return;
    chunk_of_.resize(u.R * u.L);
    for (int c = 0; c < u.n_chunks(); ++c)
      for (int i = 0; i < u.chunks[c].count; ++i) {
        const int64_t slot = u.chunks[c].start + i;
        chunk_of_[u.round(slot) * u.L + u.position(slot)] = c;
      }
    log2_.resize(u.R * u.R + 1);
    for (size_t n = 1; n < log2_.size(); ++n) log2_[n] = static_cast<T>(std::log2(n));
  }
  bool any() const { return masks() || within_ || p_.has(kDedup); }

  // The mask's share of the score of a pair, in natural units.
  T mask(int64_t query, int64_t key) const {
    const int64_t at = u_.b * p_.mask_stride_b + u_.h * p_.mask_stride_h + (u_.offset + query) * p_.mask_stride_q +
                       (u_.offset + key) * p_.mask_stride_k;
    if (p_.bool_mask) return p_.bool_mask[at] ? -std::numeric_limits<T>::infinity() : T(0);
    if (!p_.float_mask) return 0;
    const T value = static_cast<const T*>(p_.float_mask)[at];
    return value <= T(-1e30) ? -std::numeric_limits<T>::infinity() : value;
  }

  void lanes(const int* query, int count, PairLanes<T>& to) const {
    if (!within_ && !p_.has(kDedup)) return;
    for (int r = 0; r < u_.R; ++r)
      for (int l = 0; l < kQueries; ++l) {
        const int64_t at = r * u_.L + query[l < count ? l : 0];
        if (within_) to.bucket[r * kQueries + l] = buckets_[at];
        if (!p_.has(kDedup)) continue;
        to.chunk[r * kQueries + l] = chunk_of_[at];
        to.segment[r * kQueries + l] = u_.chunks[chunk_of_[at]].segment;
      }
  }

  // bias [keys][64], in units of log 2, of the first `count` of the `queries` lanes.
  void block(int round, const int* query, int count, int64_t queries, const PairLanes<T>& lanes,
             const ChunkRows<T>& keys, int key_chunk, T* bias) const {
    const Vec<T> never = splat(-std::numeric_limits<T>::infinity());
    const bool same_round = meets_in_round(round, u_.round(u_.chunks[key_chunk].start));
    count = std::min<int64_t>(count, queries);
    for (int i = 0; i < keys.count; ++i) {
      const int key = keys.position[i];
      T* row = bias + i * kQueries;
      std::fill(row, row + queries, T(0));
      if (masks())
        for (int l = 0; l < count; ++l)
          if (query[l] < u_.n_queries) row[l] = mask(query[l], key) * static_cast<T>(kLog2e);
      for (int64_t l = 0; l < queries; l += kLanes<T>) {
        Vec<T> x = load<T>(row + l);
        if (p_.has(kDedup)) {
          const IVec<T> times = times_met(lanes, key, l);
          for (int j = 0; j < kLanes<T>; ++j) x[j] -= log2(times[j]);
        }
        if (within_) {
          const IVec<T> bucket = splat_int<T>(buckets_[round * u_.L + key]);
          const auto same = load_int<T>(lanes.bucket + round * kQueries + l) == bucket;
          x = same & splat_int<T>(same_round ? -1 : 0) ? x : never;
        }
        store<T>(row + l, x);
      }
    }
  }

  bool meets_in_round(int round, int key_round) const { return !within_ || round == key_round; }

 private:
  bool masks() const { return p_.bool_mask || p_.float_mask; }

  T log2(int64_t n) const { return n < static_cast<int64_t>(log2_.size()) ? log2_[n] : static_cast<T>(std::log2(n)); }

  // How often the queries at lane l meet the key over all rounds.
  IVec<T> times_met(const PairLanes<T>& lanes, int key, int64_t l) const {
    const int n = u_.n_chunks(), window = u_.before + 1 + u_.after;
    IVec<T> times{};
    for (int r = 0; r < u_.R; ++r)
      for (int s = within_ ? r : 0; s < (within_ ? r + 1 : u_.R); ++s) {
        const int64_t at = r * kQueries + l;
        const int chunk = chunk_of_[s * u_.L + key];
        // The chunk's place in the query's window, and (in a ring shorter than the window) every n after it.
        IVec<T> place = splat_int<T>(chunk + (u_.ring ? u_.before % n : u_.before)) - load_int<T>(lanes.chunk + at);
        IVec<T> meets = splat_int<T>(-1);
        if (u_.ring) {
          place = place < 0 ? place + n : place;
          place = place >= n ? place - n : place;
        } else {
          meets = (place >= 0) & (load_int<T>(lanes.segment + at) == splat_int<T>(u_.chunks[chunk].segment));
        }
        if (within_) meets &= load_int<T>(lanes.bucket + at) == splat_int<T>(buckets_[s * u_.L + key]);
        for (int first = 0; first < (u_.ring ? window : 1); first += n) times -= meets & (place < window - first);
      }
    return times;
  }

  const AttentionParams& p_;
  const Unit& u_;
  const std::vector<int32_t>& buckets_;
  bool within_;
  std::vector<int32_t> chunk_of_;  // [R, L] the chunk of every position
  std::vector<T> log2_;
};

// Shared QK: may a query that sees nothing else use its own key?
template <class T>
bool own_allowed(const AttentionParams& p, const Unit& u, const PairRules<T>& rules, int64_t position) {
  if (!p.shared() || (p.padding && p.padding[u.b * p.L + u.offset + position])) return false;
  return rules.mask(position, position) > kMasked<T>;
}

// What attention to lists of keys needs beside that.
template <class T>
struct ListState {
  Buffer<T> seen;                                            // [L] keys that a query saw, less the context
  Buffer<T> key_sums, value_sums, counts;                    // of the keys before a block; see rest.h
  Buffer<T> key_weight, value_weight, query_sums, out_sums;  // the same backward
  Buffer<T> dK, dV;                                          // of every place of the lists of some chunks
  std::vector<int32_t> keys, order, scratch;                 // the keys of those places, and their order by key
};

// A unit with what its workers share.
template <class T>
struct Shared {
  Unit unit;
  std::vector<int32_t> buckets;
  std::optional<PairRules<T>> rules;
  Buffer<T> row_a, row_b;  // [L] of state
  HalfRows<T> half;
  ListState<T> lists;

  void start(const AttentionParams& p, int64_t index) {
    make_unit(p, index, unit, buckets);
    rules.emplace(p, unit, buckets);
  }
};

// Runs process(shared, parallel) for every unit. parallel(begin, end, f) calls f(scratch, begin', end') on parts of the
// range: whole units go to workers where there are enough of them, otherwise the parts of one unit do.
template <class T, class Scratch, class F>
void for_each_unit(const AttentionParams& p, const Threads& threads, F&& process) {
  const int64_t units = n_units(p);
  const int workers = threads.count;
  const int64_t together =
      std::max<int64_t>(1, p.group() * p.n_sequences);  // query heads add to the gradients of their key head in turn
  const int64_t tasks = units / together;
  const bool by_unit = workers == 1 || tasks % workers == 0 || tasks >= 4 * workers;
  std::vector<Scratch> scratch;
  scratch.reserve(workers);
  for (int w = 0; w < workers; ++w) scratch.emplace_back(p);
  std::vector<Shared<T>> shared(by_unit ? workers : 1);
  for (auto& s : shared) s.row_a.resize(p.L), s.row_b.resize(p.L);
  std::atomic<bool> out_of_memory{false};
  auto guarded = [&](auto&& f) {  // an exception must not leave a worker
    try {
      f();
    } catch (const std::exception&) {  // bad_alloc or length_error
      out_of_memory = true;
    }
  };
  if (by_unit) {
    threads.for_each_worker([&](int w) {
      guarded([&] {
        const int64_t begin = tasks * w / workers * together, end = tasks * (w + 1) / workers * together;
        for (int64_t i = begin; i < end; ++i) {
          shared[w].start(p, i);
          if (shared[w].unit.L == 0) continue;
          process(shared[w], [&](int64_t begin, int64_t end, auto&& f) { f(scratch[w], begin, end); });
        }
      });
    });
  } else {
    for (int64_t i = 0; i < units; ++i) {
      shared[0].start(p, i);
      if (shared[0].unit.L == 0) continue;
      process(shared[0], [&](int64_t begin, int64_t end, auto&& f) {
        threads.for_each_worker([&](int w) {
          const int64_t from = begin + (end - begin) * w / workers, to = begin + (end - begin) * (w + 1) / workers;
          if (from < to) guarded([&] { f(scratch[w], from, to); });
        });
      });
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

// Calls f(position, weight, times) once for every chunk in which a flagged query meets itself: weight is the sum of its
// dropout factors there, times how often it does.
template <class T, class F>
void visit_self_only(const AttentionParams& p, const Unit& u, const PairRules<T>& rules, const bool* self_only, F&& f) {
  for (int c = 0; c < u.n_chunks(); ++c) {
    const Chunk q = u.chunks[c];
    for (int i = 0; i < q.count; ++i) {
      const int position = u.position(q.start + i);
      if (position >= u.n_queries || !self_only[position]) continue;
      int64_t place = 0;
      int times = 0;
      T weight = 0;
      for (int o = -u.before; o <= u.after; ++o) {
        const int k = u.chunk_at(c + o, c);
        if (k < 0) continue;
        const Chunk keys = u.chunks[k];
        for (int j = 0; j < keys.count; ++j, ++place) {
          if (u.position(keys.start + j) != position || !rules.meets_in_round(u.round(q.start), u.round(keys.start)))
            continue;
          ++times;
          T factor[kQueries] = {T(1)};
          const int32_t query_place = i, row = 0;
          if (p.dropout()) dropout_block<T>(p, u, q.start, &query_place, 1, place, &row, 1, factor);
          weight += factor[0];
        }
      }
      f(position, weight, times);
    }
  }
}

}  // namespace rk::cpu::RK_ISA
