// What forward and backward share: the score_mod, and how sequences are spread over workers.
#pragma once
#include "kernels/cpu/chunk.h"
#include "kernels/cpu/half.h"
#include "kernels/cpu/random.h"

namespace rk::cpu::RK_ISA {

// What ScoreMod needs to know about the queries of a block: their buckets, chunks and segments in every round, [R][64].
template <class T>
struct ScoreModLanes {
  Buffer<Int<T>> bucket, chunk, bucket_begin;
  explicit ScoreModLanes(const AttentionParams& p)
      : bucket(p.R * kQueries), chunk(p.R * kQueries), bucket_begin(p.R * kQueries) {}
};

// What attn_mask and the rules within_bucket and dedup add to the score of a pair; -infinity masks it.
template <class T>
class ScoreMod {
 public:
  ScoreMod(const AttentionParams& p, const HeadSequence& seq, const std::vector<int32_t>& buckets)
      : p_(p), seq_(seq), buckets_(buckets) {
    if (!p.has_score_mod() || seq.single_window) return;
    within_ = p.has(kWithinBucket) && !buckets.empty();
    dedup_ = p.has(kDedup);
    if (!dedup_) return;
    chunk_of_.resize(seq.R * seq.L);
    for (int c = 0; c < seq.n_chunks(); ++c)
      for (int i = 0; i < seq.chunks[c].count; ++i) {
        const int64_t slot = seq.chunks[c].start + i;
        chunk_of_[seq.round(slot) * seq.L + seq.position(slot)] = c;
      }
    log2_.resize(seq.R * seq.R + 1);
    for (size_t n = 1; n < log2_.size(); ++n) log2_[n] = static_cast<T>(std::log2(n));
  }
  bool has_mask() const { return p_.bool_mask || p_.float_mask; }
  bool any() const { return has_mask() || within_ || dedup_; }

  // What attn_mask adds to the score of a pair, in natural units.
  T mask(int64_t query, int64_t key) const {
    const int64_t at = seq_.b * p_.mask_stride_b + seq_.h * p_.mask_stride_h +
                       (seq_.offset + query) * p_.mask_stride_q + (seq_.offset + key) * p_.mask_stride_k;
    if (p_.bool_mask) return p_.bool_mask[at] ? -std::numeric_limits<T>::infinity() : T(0);
    if (!p_.float_mask) return 0;
    const T value = static_cast<const T*>(p_.float_mask)[at];
    return value <= T(-1e30) ? -std::numeric_limits<T>::infinity() : value;
  }

  void lanes(const int* query, int count, ScoreModLanes<T>& to) const {
    if (!within_ && !dedup_) return;
    for (int r = 0; r < seq_.R; ++r)
      for (int l = 0; l < kQueries; ++l) {
        const int64_t at = r * seq_.L + query[l < count ? l : 0];
        if (within_) to.bucket[r * kQueries + l] = buckets_[at];
        if (!dedup_) continue;
        to.chunk[r * kQueries + l] = chunk_of_[at];
        to.bucket_begin[r * kQueries + l] = seq_.chunks[chunk_of_[at]].bucket_begin;
      }
  }

  // Writes bias [keys][64] of `queries` lanes, of which `count` have a query. Units of log 2.
  void block(int round, const int* query, int count, int64_t queries, const ScoreModLanes<T>& lanes,
             const ChunkRows<T>& keys, int key_chunk, T* bias) const {
    const Vec<T> never = splat(-std::numeric_limits<T>::infinity());
    const bool same_round = meets_in_round(round, seq_.round(seq_.chunks[key_chunk].start));
    count = std::min<int64_t>(count, queries);
    for (int i = 0; i < keys.count; ++i) {
      const int key = keys.position[i];
      T* row = bias + i * kQueries;
      std::fill(row, row + queries, T(0));
      if (has_mask())
        for (int l = 0; l < count; ++l)
          if (query[l] < seq_.n_queries) row[l] = mask(query[l], key) * static_cast<T>(kLog2e);
      for (int64_t l = 0; l < queries; l += kLanes<T>) {
        Vec<T> x = load<T>(row + l);
        if (dedup_) {
          const IVec<T> times = times_met(lanes, key, l);
          for (int j = 0; j < kLanes<T>; ++j) x[j] -= log2(times[j]);
        }
        if (within_) {
          const IVec<T> bucket = splat_int<T>(buckets_[round * seq_.L + key]);
          const auto same = load_int<T>(lanes.bucket + round * kQueries + l) == bucket;
          x = same & splat_int<T>(same_round ? -1 : 0) ? x : never;
        }
        store<T>(row + l, x);
      }
    }
  }

  bool meets_in_round(int round, int key_round) const { return !within_ || round == key_round; }

 private:
  T log2(int64_t n) const { return n < static_cast<int64_t>(log2_.size()) ? log2_[n] : static_cast<T>(std::log2(n)); }

  // How often the queries from lane l on meet the key in all rounds.
  IVec<T> times_met(const ScoreModLanes<T>& lanes, int key, int64_t l) const {
    const int n = seq_.n_chunks(), window = seq_.before + 1 + seq_.after;
    IVec<T> times{};
    for (int r = 0; r < seq_.R; ++r)
      for (int s = within_ ? r : 0; s < (within_ ? r + 1 : seq_.R); ++s) {
        const int64_t at = r * kQueries + l;
        const int chunk = chunk_of_[s * seq_.L + key];
        // The offset of the key's chunk in the query's window. In a ring of n chunks that is shorter than the window it
        // is there again after every n.
        IVec<T> offset =
            splat_int<T>(chunk + (seq_.wraps ? seq_.before % n : seq_.before)) - load_int<T>(lanes.chunk + at);
        IVec<T> meets = splat_int<T>(-1);
        if (seq_.wraps) {
          offset = offset < 0 ? offset + n : offset;
          offset = offset >= n ? offset - n : offset;
        } else {
          meets =
              (offset >= 0) & (load_int<T>(lanes.bucket_begin + at) == splat_int<T>(seq_.chunks[chunk].bucket_begin));
        }
        if (within_) meets &= load_int<T>(lanes.bucket + at) == splat_int<T>(buckets_[s * seq_.L + key]);
        for (int first = 0; first < (seq_.wraps ? window : 1); first += n) times -= meets & (offset < window - first);
      }
    return times;
  }

  const AttentionParams& p_;
  const HeadSequence& seq_;
  const std::vector<int32_t>& buckets_;
  bool within_ = false, dedup_ = false;
  std::vector<int32_t> chunk_of_;  // [R, L] the chunk of every position
  std::vector<T> log2_;
};

// Shared QK: may a query that sees nothing else use its own key?
template <class T>
bool self_allowed(const AttentionParams& p, const HeadSequence& seq, const ScoreMod<T>& score_mod, int64_t position) {
  if (!p.shared_qk() || (p.padding && p.padding[seq.b * p.L + seq.offset + position])) return false;
  return score_mod.mask(position, position) > kMasked<T>;
}

// The state of attention to lists of keys.
template <class T>
struct ListState {
  Buffer<T> seen;  // [L] how many keys a query saw, without context keys
  // Sums over blocks of positions; see rest.h.
  Buffer<T> key_sums, value_sums, counts;
  Buffer<T> key_weight, value_weight, query_sums, out_sums;
  Buffer<T> dK, dV;           // gradients of the list entries of some chunks
  std::vector<int32_t> keys;  // the keys of those entries
  std::vector<int32_t> order, scratch;
};

// What the workers on one sequence of one head share.
template <class T>
struct SequenceState {
  HeadSequence sequence;
  std::vector<int32_t> buckets;
  std::optional<ScoreMod<T>> score_mod;
  Buffer<T> row_a, row_b;  // [L] of state
  HalfRows<T> half;
  ListState<T> lists;

  void start(const AttentionParams& p, int64_t index) {
    make_head_sequence(p, index, sequence, buckets);
    score_mod.emplace(p, sequence, buckets);
  }
};

// Runs process(state, parallel) for every sequence of every head. parallel(begin, end, f) calls f(scratch, begin',
// end') on parts of the range. If there are enough sequences each worker takes whole ones. Otherwise the workers share
// the parts of one sequence after the other.
template <class T, class Scratch, class F>
void for_each_head_sequence(const AttentionParams& p, const Threads& threads, F&& process) {
  const int64_t sequences = n_head_sequences(p);
  const int workers = threads.count;
  // Query heads add to the gradients of their key head one after the other.
  const int64_t together = std::max<int64_t>(1, p.group() * p.n_sequences);
  const int64_t tasks = sequences / together;
  const bool by_task = workers == 1 || tasks % workers == 0 || tasks >= 4 * workers;
  std::vector<Scratch> scratch;
  scratch.reserve(workers);
  for (int w = 0; w < workers; ++w) scratch.emplace_back(p);
  std::vector<SequenceState<T>> states(by_task ? workers : 1);
  for (auto& s : states) s.row_a.resize(p.L), s.row_b.resize(p.L);
  std::atomic<bool> out_of_memory{false};
  auto guarded = [&](auto&& f) {  // an exception must not leave a worker
    try {
      f();
    } catch (const std::exception&) {  // bad_alloc or length_error
      out_of_memory = true;
    }
  };
  if (by_task) {
    threads.for_each_worker([&](int w) {
      guarded([&] {
        const int64_t begin = tasks * w / workers * together, end = tasks * (w + 1) / workers * together;
        for (int64_t i = begin; i < end; ++i) {
          states[w].start(p, i);
          if (states[w].sequence.L == 0) continue;
          process(states[w], [&](int64_t begin, int64_t end, auto&& f) { f(scratch[w], begin, end); });
        }
      });
    });
  } else {
    for (int64_t i = 0; i < sequences; ++i) {
      states[0].start(p, i);
      if (states[0].sequence.L == 0) continue;
      process(states[0], [&](int64_t begin, int64_t end, auto&& f) {
        threads.for_each_worker([&](int w) {
          const int64_t from = begin + (end - begin) * w / workers, to = begin + (end - begin) * (w + 1) / workers;
          if (from < to) guarded([&] { f(scratch[w], from, to); });
        });
      });
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

// Calls f(position, weight, times) for every chunk in which a self_only query meets its own key. times: how often it
// does so there. weight: the sum of the dropout factors.
template <class T, class F>
void visit_self_only(const AttentionParams& p, const HeadSequence& seq, const ScoreMod<T>& score_mod,
                     const bool* self_only, F&& f) {
  for (int c = 0; c < seq.n_chunks(); ++c) {
    const Chunk q = seq.chunks[c];
    for (int i = 0; i < q.count; ++i) {
      const int position = seq.position(q.start + i);
      if (position >= seq.n_queries || !self_only[position]) continue;
      int64_t window_index = 0;
      int times = 0;
      T weight = 0;
      for (int o = -seq.before; o <= seq.after; ++o) {
        const int k = seq.chunk_at(c + o, c);
        if (k < 0) continue;
        const Chunk keys = seq.chunks[k];
        for (int j = 0; j < keys.count; ++j, ++window_index) {
          if (seq.position(keys.start + j) != position ||
              !score_mod.meets_in_round(seq.round(q.start), seq.round(keys.start)))
            continue;
          ++times;
          T factor[kQueries] = {T(1)};
          const int32_t query_slot = i, row = 0;
          if (p.dropout()) dropout_block<T>(p, seq, q.start, &query_slot, 1, window_index, &row, 1, factor);
          weight += factor[0];
        }
      }
      f(position, weight, times);
    }
  }
}

}  // namespace rk::cpu::RK_ISA
