// Which keys each chunk of queries attends: its local window, and the keys to which its queries give most weight.
//
// A chunk is divided into sub-groups, and a mean query stands for each. The weight of a key is the sum over sub-groups
// of the mean query's softmax over the keys, times the share of the sub-group's queries to which the key is new:
// visible, and not in their local window. If there are many keys, blocks of keys are chosen first, by their mean keys,
// and then keys of these.
#pragma once
#include "kernels/cpu/blocks.h"
#include "kernels/cpu/work.h"

namespace rk::cpu::RK_ISA {

constexpr int64_t kSubgroups = 4;        // of a chunk; one mean query stands for each
constexpr int64_t kExactKeys = 16384;    // with more keys, blocks of keys are chosen first
constexpr int64_t kKeyBlock = kQueries;  // keys of a block
constexpr int64_t kChosenBlocks = 64;    // at least; or twice as many as the budget fills

// Added to weights, so that a weight of zero differs from a key that must not be taken.
template <class T>
constexpr T kLeast = T(1e-30);

template <class T>
struct SelectScratch {
  int64_t Dp;                           // D, padded
  int64_t size;                         // queries of a sub-group
  int64_t subgroups;                    // of a chunk
  int64_t batch;                        // chunks that are done at once
  int64_t rows;                         // batch * subgroups
  Buffer<T> queries;                    // [size][Dp]
  Buffer<T> means;                      // [rows][Dp]
  Buffer<T> keys;                       // [64][Dp]
  Buffer<T> KT;                         // [Dp][64]
  Buffer<T> tile;                       // [rows][64]
  std::vector<int> members;             // [rows][size] positions of queries, then -1
  std::vector<int> largest;             // [rows] the last position that a row sees
  std::vector<int> n_seen;              // [rows] how many candidates it sees
  std::vector<T> weights;               // [rows][candidates], those of a block in units of 2^tops
  std::vector<T> tops;                  // [rows][blocks]
  std::vector<T> top;                   // [rows] the largest of tops
  std::vector<T> sum;                   // [rows] of the weights, in units of 2^top
  std::vector<T> total, bias, padding;  // [candidates]
  std::vector<T> block_tops;            // the largest total of each block
  std::vector<T> largest_tops;
  std::vector<int> candidates, chosen, positions;
  std::vector<std::pair<int, int>> steps;  // {i, n}: n more queries have not seen the keys from candidate i on
  Prefetch prefetch;

  explicit SelectScratch(const AttentionParams& p) : Dp(round_up(p.D, kRowPad)) {
    const int64_t chunk = std::min(p.chunk_length, std::max<int64_t>(p.L, 1));
    size = std::min((p.chunk_length + kSubgroups - 1) / kSubgroups, chunk), subgroups = (chunk + size - 1) / size;
    batch = kQueries / kSubgroups, rows = batch * subgroups;
    queries.resize(round_up(size, kRowPad) * Dp), means.resize(rows * Dp);
    keys.resize(kKeyBlock * Dp), KT.resize(Dp * kKeyBlock), tile.resize(rows * kKeyBlock);
    members.resize(rows * size), largest.resize(rows), n_seen.resize(rows), top.resize(rows), sum.resize(rows);
    bias.resize(kKeyBlock);
  }
};

// What all chunks of a sequence share.
template <class T>
struct KeyBlocks {
  int64_t n_keys, count;  // keys without context keys; blocks
  Buffer<T> means;        // [count][Dp], if two_steps
  Buffer<T> transposed;   // [count][Dp][64], if not
  std::vector<int> sizes;
  bool two_steps;
};

template <class T>
class Selection {
 public:
  Selection(const SelectParams& select, const AttentionParams& p, SequenceState<T>& state, KeyBlocks<T>& blocks)
      : select_(select),
        p_(p),
        seq_(state.sequence),
        score_mod_(*state.score_mod),
        blocks_(blocks),
        padding_(p.padding ? p.padding + seq_.b * p.S : nullptr) {}

  const LocalWindow& window(int64_t chunk) const { return select_.windows[seq_.b * seq_.round_begin[1] + chunk]; }

  // Writes a list of the first of two rounds: context keys and the local window.
  void local_row(int64_t chunk) const {
    int32_t* list = row(chunk);
    list = write_context(list);
    const LocalWindow& w = window(chunk);
    for (int k = w.begin; k < w.end; ++k)
      if (!padded(k)) *list++ = k;
    std::fill(list, row(chunk) + p_.list_length, -1);
  }

  void chunks(SelectScratch<T>& s, int64_t begin, int64_t end) const {
    const int64_t batch = blocks_.two_steps ? 1 : s.batch;
    for (int64_t c = begin; c < end; c += batch) {
      const int64_t n = std::min(batch, end - c);
      std::fill_n<T*>(s.means, n * s.subgroups * s.Dp, T(0));  // sub-groups without members need zeros, too
      for (int64_t i = 0; i < n; ++i) fill_members(s, c + i, i * s.subgroups), mean_queries(s, i * s.subgroups);
      if (blocks_.two_steps)
        choose_blocks(s);
      else
        all_keys(s);
      weigh_keys(s, n * s.subgroups);
      for (int64_t i = 0; i < n; ++i) select_row(s, c + i, i * s.subgroups);
    }
  }

  // to [Dp][64]
  void transpose_keys(SelectScratch<T>& s, const int* key, int count, T* to) const {
    gather<T>(p_.key, seq_, seq_.key_head, key, count, static_cast<int>(p_.S), p_.D, s.keys, s.Dp);
    transpose_rows<T>(s.keys, s.Dp, count, p_.D, to);
  }

  void transpose_block(SelectScratch<T>& s, int64_t block) const {
    int key[kKeyBlock];
    std::iota(key, key + kKeyBlock, static_cast<int>(block * kKeyBlock));
    const int64_t count = std::min(kKeyBlock, blocks_.n_keys - block * kKeyBlock);
    transpose_keys(s, key, static_cast<int>(count), blocks_.transposed + block * s.Dp * kKeyBlock);
  }

 private:
  bool padded(int key) const { return padding_ && padding_[key]; }
  int32_t* row(int64_t chunk) const {
    return select_.lists + ((seq_.b * p_.H + seq_.h) * seq_.n_chunks() + chunk) * p_.list_length;
  }
  int32_t* write_context(int32_t* list) const {
    for (int64_t k = blocks_.n_keys; k < p_.S; ++k) *list++ = static_cast<int32_t>(k);
    return list;
  }

  // Calls f(row, positions, count) for the sub-groups of a chunk, the first of which is in row `first`.
  template <class F>
  void each_subgroup(const SelectScratch<T>& s, int64_t first, F&& f) const {
    for (int64_t m = first; m < first + s.subgroups; ++m) {
      const int* position = s.members.data() + m * s.size;
      const int count = static_cast<int>(std::find(position, position + s.size, -1) - position);
      if (count > 0) f(m, position, count);
    }
  }

  // The queries of a chunk that choose its keys: those that are no padding, or all if there are no others.
  void fill_members(SelectScratch<T>& s, int64_t chunk, int64_t first) const {
    const Chunk c = seq_.chunks[chunk];
    int* members = s.members.data() + first * s.size;
    std::fill_n(members, s.subgroups * s.size, -1);
    const bool* padding = select_.query_padding ? select_.query_padding + seq_.b * p_.L : nullptr;
    int n = 0;
    for (int i = 0; i < c.count; ++i)
      if (const int position = seq_.position(c.start + i); !(padding && padding[position])) members[n++] = position;
    if (n == 0)
      for (int i = 0; i < c.count; ++i) members[i] = seq_.position(c.start + i);
  }

  void mean_queries(SelectScratch<T>& s, int64_t first) const {
    each_subgroup(s, first, [&](int64_t m, const int* position, int count) {
      gather<T>(p_.query, seq_, seq_.h, position, count, static_cast<int>(p_.L), p_.D, s.queries, s.Dp);
      T* mean = s.means + m * s.Dp;
      for (int i = 0; i < count; ++i) add_row<T>(mean, s.queries + i * s.Dp, s.Dp, T(1) / count);
      s.largest[m] = p_.has(kCausal) ? *std::max_element(position, position + count) : std::numeric_limits<int>::max();
    });
  }

  void all_keys(SelectScratch<T>& s) const {
    s.candidates.resize(blocks_.n_keys);
    std::iota(s.candidates.begin(), s.candidates.end(), 0);
  }

  // The candidates are the keys of the blocks to which the chunk's queries give most weight.
  void choose_blocks(SelectScratch<T>& s) const {
    s.total.assign(blocks_.count, T(0));
    std::vector<T>& x = s.tops;
    each_subgroup(s, 0, [&](int64_t m, const int*, int) {
      T top = kLowest<T>, sum = 0;
      x.assign(blocks_.count, kMasked<T>);
      for (int64_t b = 0; b < blocks_.count && b * kKeyBlock <= s.largest[m]; ++b) {
        if (blocks_.sizes[b] == 0) continue;
        const T product = dot<T>(s.means + m * s.Dp, blocks_.means + b * s.Dp, s.Dp);
        x[b] = product * static_cast<T>(p_.scale) + std::log(T(blocks_.sizes[b]));
        top = std::max(top, x[b]);
      }
      for (T& value : x) sum += value = std::exp(value - top);
      if (!(sum > 0)) return;  // it sees no block, or a score is NaN
      for (int64_t b = 0; b < blocks_.count; ++b)
        s.total[b] += x[b] / sum + (b * kKeyBlock <= s.largest[m] && blocks_.sizes[b] ? kLeast<T> : T(0));
    });
    take_largest(s, std::max(kChosenBlocks, 2 * ((select_.budget + kKeyBlock - 1) / kKeyBlock)));
    s.candidates.clear();
    for (int b : s.chosen)
      for (int64_t k = b * kKeyBlock; k < std::min((b + 1) * kKeyBlock, blocks_.n_keys); ++k)
        s.candidates.push_back(static_cast<int>(k));
  }

  int below(const SelectScratch<T>& s, int position) const {
    return static_cast<int>(std::lower_bound(s.candidates.begin(), s.candidates.end(), position) -
                            s.candidates.begin());
  }

  // Weighs the candidates for every mean query, block by block. Weights of a block are in units of the exponential of
  // the largest score so far, so that scores do not leave the cache.
  void weigh_keys(SelectScratch<T>& s, int64_t rows) const {
    const int64_t n = s.candidates.size(), blocks = (n + kKeyBlock - 1) / kKeyBlock;
    s.weights.resize(rows * blocks * kKeyBlock), s.tops.resize(rows * blocks);
    s.padding.assign(blocks * kKeyBlock, kMasked<T>);
    for (int64_t j = 0; j < n; ++j)
      if (!padded(s.candidates[j])) s.padding[j] = 0;
    for (int64_t m = 0; m < rows; ++m) {
      const bool none = s.members[m * s.size] < 0;
      s.n_seen[m] = none ? 0 : p_.has(kCausal) ? below(s, s.largest[m] + 1) : static_cast<int>(n);
      s.top[m] = kLowest<T>, s.sum[m] = 0;
    }
    const int64_t furthest = *std::max_element(s.n_seen.begin(), s.n_seen.begin() + rows);
    s.prefetch.clear();
    s.prefetch.ready(s.Dp);
    for (int64_t k = 0; k < furthest; k += kKeyBlock) {
      const int count = static_cast<int>(std::min(kKeyBlock, n - k));
      if (blocks_.two_steps) transpose_keys(s, s.candidates.data() + k, count, s.KT);
      const T* KT = blocks_.two_steps ? s.KT : blocks_.transposed + k * s.Dp;
      product<T>(rows, kKeyBlock, s.tile, kKeyBlock, false,
                 [&]<int M, int N>(Vec<T>(&acc)[M][N], int64_t i0, int64_t j0) RK_LAMBDA {
                   multiply<T, false>(acc, s.means + i0 * s.Dp, s.Dp, KT + j0, kQueries, p_.D, s.prefetch);
                 });
      for (int64_t m = 0; m < rows; ++m)
        if (k < s.n_seen[m]) weigh_block(s, m, k, blocks);
    }
  }

  void weigh_block(SelectScratch<T>& s, int64_t m, int64_t k, int64_t blocks) const {
    const int seen = static_cast<int>(std::min(kKeyBlock, s.n_seen[m] - k));
    const T *bias = s.padding.data() + k, *product = s.tile + m * kKeyBlock;
    if (score_mod_.has_mask()) mean_bias(s, m, k, seen), bias = s.bias.data();
    T *x = s.weights.data() + (m * blocks) * kKeyBlock + k, scores[kKeyBlock];
    const Vec<T> scale = splat(static_cast<T>(p_.scale * kLog2e));
    Vec<T> tops = splat(s.top[m]), sums{};
    for (int j = 0; j < kKeyBlock; j += kLanes<T>) {
      Vec<T> y = load<T>(product + j) * scale + load<T>(bias + j);
      y = load<T>(bias + j) > splat(kMasked<T>) ? y : splat(kMasked<T>);  // also if a masked key is NaN
      if (j + kLanes<T> > seen)
        for (int i = std::max(0, seen - j); i < kLanes<T>; ++i) y[i] = kMasked<T>;
      tops = maximum<T>(tops, y);
      store<T>(scores + j, y);
    }
    T top = tops[0];
    for (int i = 1; i < kLanes<T>; ++i) top = std::max<T>(top, tops[i]);
    for (int j = 0; j < kKeyBlock; j += kLanes<T>) {
      const Vec<T> e = exp2(load<T>(scores + j) - splat(top));
      sums += e;
      store<T>(x + j, e);
    }
    s.sum[m] = s.sum[m] * std::exp2(s.top[m] - top) + sum<T>(sums);
    s.top[m] = s.tops[m * blocks + k / kKeyBlock] = top;
    if (score_mod_.has_mask())
      for (int j = 0; j < seen; ++j)
        if (!(bias[j] > kMasked<T>)) x[j] = -1;  // must not be taken
  }

  void select_row(SelectScratch<T>& s, int64_t chunk, int64_t first_row) const {
    const int64_t n = s.candidates.size();
    s.total.assign(n, T(0));
    each_subgroup(s, first_row, [&](int64_t m, const int* position, int count) { add_weights(s, m, position, count); });
    int32_t* list = row(chunk);
    LocalWindow local = window(chunk % seq_.round_begin[1]);
    s.positions.clear();
    if (seq_.R == 1) {
      list = write_context(list);
      for (int k = local.begin; k < local.end; ++k)
        if (!padded(k)) s.positions.push_back(k);
    } else {
      local.begin = local.end = 0;
    }
    for (int64_t j = 0; j < n; ++j)
      if (const int k = s.candidates[j]; padded(k) || (k >= local.begin && k < local.end)) s.total[j] = 0;
    take_largest(s, local.most - static_cast<int64_t>(s.positions.size()));
    for (int& j : s.chosen) j = s.candidates[j];
    list = std::merge(s.chosen.begin(), s.chosen.end(), s.positions.begin(), s.positions.end(), list);
    std::fill(list, row(chunk) + p_.list_length, -1);
  }

  // total += the softmax of a sub-group, times the share of its queries that have not seen the key yet.
  void add_weights(SelectScratch<T>& s, int64_t m, const int* position, int count) const {
    if (!(s.sum[m] > 0)) return;
    // New to a query are the keys up to its own position (causal) or all keys, except those of its local window.
    s.steps.clear();
    auto step = [&](int from, int to, int by) {
      if (from < to) s.steps.emplace_back(from, by), s.steps.emplace_back(to, -by);
    };
    for (int i = 0; i < count; ++i) {
      const int to = p_.has(kCausal) ? below(s, position[i] + 1) : s.n_seen[m];
      step(0, to, 1);
      if (seq_.R == 1) continue;  // the window of the whole chunk is left out later
      const LocalWindow& w = window(position[i] / p_.chunk_length);
      step(std::min(below(s, w.begin), to), std::min(below(s, w.end), to), -1);
    }
    std::sort(s.steps.begin(), s.steps.end());
    int queries = 0;
    for (size_t i = 0; i < s.steps.size(); ++i) {
      queries += s.steps[i].second;
      const int from = s.steps[i].first, to = i + 1 < s.steps.size() ? s.steps[i + 1].first : s.n_seen[m];
      if (queries > 0) add_range(s, m, from, to, static_cast<T>(queries) / count);
    }
  }

  void add_range(SelectScratch<T>& s, int64_t m, int from, int to, T share) const {
    const int64_t blocks = s.padding.size() / kKeyBlock;
    const T* x = s.weights.data() + m * blocks * kKeyBlock;
    T* total = s.total.data();
    const T least = share * kLeast<T>;
    while (from < to) {
      const int end = static_cast<int>(std::min<int64_t>(to, (from / kKeyBlock + 1) * kKeyBlock));
      const T factor = share / s.sum[m] * std::exp2(s.tops[m * blocks + from / kKeyBlock] - s.top[m]);
      if (score_mod_.has_mask()) {
        for (int j = from; j < end; ++j)
          if (x[j] >= 0) total[j] += x[j] * factor + least;
      } else {
        for (int j = from; j < end; ++j) total[j] += x[j] * factor + least;
      }
      from = end;
    }
  }

  // Writes bias [64] for the candidates from k on: the mean of attn_mask over the queries of a sub-group that may see
  // the key, plus the logarithm of their share.
  void mean_bias(SelectScratch<T>& s, int64_t m, int64_t k, int n) const {
    const int* position = s.members.data() + m * s.size;
    const int* key = s.candidates.data() + k;
    T* bias = s.bias.data();
    int seeing[kKeyBlock] = {}, count = 0;
    std::fill_n(bias, kKeyBlock, T(0));
    for (; count < s.size && position[count] >= 0; ++count)
      for (int j = 0; j < n && !(p_.has(kCausal) && key[j] > position[count]); ++j)
        if (const T mask = score_mod_.mask(position[count], key[j]); mask > kMasked<T>) bias[j] += mask, ++seeing[j];
    for (int j = 0; j < n; ++j)
      bias[j] = seeing[j] && s.padding[k + j] == 0
                    ? bias[j] / seeing[j] * static_cast<T>(kLog2e) + std::log2(T(seeing[j]) / count)
                    : kMasked<T>;
  }

  // chosen = the rising indices of the `wanted` largest positive totals. Of equal totals the first are taken.
  void take_largest(SelectScratch<T>& s, int64_t wanted) const {
    const int64_t n = s.total.size(), blocks = (n + kKeyBlock - 1) / kKeyBlock;
    s.chosen.clear();
    if (wanted <= 0 || n == 0) return;
    s.total.resize(blocks * kKeyBlock, T(0));
    // At least `wanted` blocks have a maximum this large, so smaller totals need not be looked at.
    s.block_tops.resize(blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      Vec<T> top{};
      for (int64_t j = b * kKeyBlock; j < (b + 1) * kKeyBlock; j += kLanes<T>)
        top = maximum<T>(load<T>(&s.total[j]), top);
      s.block_tops[b] = *std::max_element(&top[0], &top[0] + kLanes<T>);
    }
    T least = std::numeric_limits<T>::denorm_min();
    if (blocks > wanted) {
      s.largest_tops = s.block_tops;
      std::nth_element(s.largest_tops.begin(), s.largest_tops.begin() + wanted - 1, s.largest_tops.end(),
                       std::greater<T>());
      least = std::max(least, s.largest_tops[wanted - 1]);
    }
    for (int64_t b = 0; b < blocks; ++b)
      if (s.block_tops[b] >= least)
        for (int64_t j = b * kKeyBlock; j < (b + 1) * kKeyBlock; ++j)
          if (s.total[j] >= least) s.chosen.push_back(static_cast<int>(j));
    if (wanted < static_cast<int64_t>(s.chosen.size())) {
      auto better = [&](int a, int b) { return s.total[a] != s.total[b] ? s.total[a] > s.total[b] : a < b; };
      std::nth_element(s.chosen.begin(), s.chosen.begin() + wanted, s.chosen.end(), better);
      s.chosen.resize(wanted);
      std::sort(s.chosen.begin(), s.chosen.end());
    }
  }

  const SelectParams& select_;
  const AttentionParams& p_;
  const HeadSequence& seq_;
  const ScoreMod<T>& score_mod_;
  KeyBlocks<T>& blocks_;
  const bool* padding_;
};

template <class T>
void select_keys(const SelectParams& select, const Threads& threads) {
  const AttentionParams& given = select.attention;
  for_each_head_sequence<T, SelectScratch<T>>(given, threads, [&](SequenceState<T>& state, auto&& parallel) {
    const HeadSequence& seq = state.sequence;
    const AttentionParams p = state.half.widen(given, seq, {kQueryRows, kKeyRows}, {}, parallel);
    KeyBlocks<T> blocks;
    blocks.n_keys = p.S - p.context_keys;
    blocks.count = (blocks.n_keys + kKeyBlock - 1) / kKeyBlock;
    blocks.two_steps = blocks.n_keys > kExactKeys && !state.score_mod->any();
    if (blocks.two_steps) {
      const int64_t Dp = round_up(p.D, kRowPad);
      blocks.means.resize(blocks.count * Dp);
      blocks.sizes.resize(blocks.count);
      parallel(0, blocks.count, [&](auto&, int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          T* mean = blocks.means + b * Dp;
          std::fill_n(mean, Dp, T(0));
          int n = 0;
          for (int64_t k = b * kKeyBlock; k < std::min((b + 1) * kKeyBlock, blocks.n_keys); ++k) {
            if (p.padding && p.padding[seq.b * p.S + k]) continue;
            add_row<T>(mean, p.key.at<T>(seq.b, seq.key_head, k), p.D);
            ++n;
          }
          blocks.sizes[b] = n;
          if (n) add_row<T>(mean, mean, Dp, T(1) / n, T(0));
        }
      });
    }
    const Selection<T> selection(select, p, state, blocks);
    if (!blocks.two_steps) {
      blocks.transposed.resize(blocks.count * round_up(p.D, kRowPad) * kKeyBlock);
      parallel(0, blocks.count, [&](SelectScratch<T>& s, int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) selection.transpose_block(s, b);
      });
    }
    if (seq.R > 1)
      parallel(0, seq.round_begin[1], [&](auto&, int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) selection.local_row(c);
      });
    parallel(seq.round_begin[seq.R - 1], seq.round_begin[seq.R],
             [&](SelectScratch<T>& s, int64_t begin, int64_t end) { selection.chunks(s, begin, end); });
  });
}

}  // namespace rk::cpu::RK_ISA
