// Which keys each chunk of queries attends: its local window, and the keys to which its queries give most weight.
//
// The weights are those of the mean queries of its sub-groups: each one's softmax over the keys, times the share of its
// queries to which a key is new. Many keys are chosen in two steps: blocks of keys by their mean keys, then keys of
// those.
#pragma once

namespace rk::cpu::RK_ISA {

constexpr int kSubgroup = 16;            // queries of a chunk that one mean stands for
constexpr int64_t kExactKeys = 16384;    // up to so many keys each is looked at
constexpr int64_t kKeyBlock = kQueries;  // keys of a block
constexpr int64_t kChosenBlocks = 64;

// A weight too small for a float still beats a key that is not to be taken.
template <class T>
constexpr T kLeast = T(1e-30);

template <class T>
struct SelectScratch {
  int64_t Dp, subgroups, batch;         // batch: chunks whose means are multiplied with the keys at once
  Buffer<T> queries, means, keys, KT;   // [16][Dp], [batch * subgroups][Dp], [64][Dp], [Dp][64]
  std::vector<int> largest;             // the last position in each sub-group
  std::vector<T> scores;                // [batch * subgroups][candidates]
  std::vector<T> total, bias, padding;  // [candidates]
  std::vector<int> candidates, chosen, positions;
  std::vector<int> members;                // [batch * subgroups][16] the positions of queries, -1: none
  std::vector<std::pair<int, int>> steps;  // from this candidate on, so many more queries see new keys
  Prefetch prefetch;

  explicit SelectScratch(const AttentionParams& p)
      : Dp(round_up(p.D, kRowPad)),
        subgroups((std::min(p.chunk_length, std::max<int64_t>(p.L, 1)) + kSubgroup - 1) / kSubgroup),
        batch(std::max<int64_t>(1, kQueries / subgroups)),
        queries(kSubgroup * Dp),
        means(batch * subgroups * Dp),
        keys(kKeyBlock * Dp),
        KT(Dp * kKeyBlock),
        largest(batch * subgroups),
        members(batch * subgroups * kSubgroup) {}
};

// What all chunks of a unit share.
template <class T>
struct KeyBlocks {
  int64_t n_keys, count;  // without the context; blocks
  Buffer<T> means;        // [count][Dp], where keys are chosen in two steps
  std::vector<int> sizes;
  bool two_steps;
};

template <class T>
class Selection {
 public:
  Selection(const SelectParams& select, const AttentionParams& p, Shared<T>& shared, KeyBlocks<T>& blocks)
      : select_(select),
        p_(p),
        u_(shared.unit),
        rules_(*shared.rules),
        blocks_(blocks),
        padding_(p.padding ? p.padding + u_.b * p.S : nullptr) {}

  // The local window of a chunk in the order of positions.
  Range window(int64_t chunk) const {
    const int64_t n = blocks_.n_keys, width = std::min(select_.local, n), start = chunk * p_.chunk_length;
    const int64_t end = std::min(start + p_.chunk_length, p_.L);
    if (width == 0) return {0, 0};
    if (p_.has(kCausal)) {
      const int64_t to = std::min(end, n);
      return {static_cast<int>(std::max<int64_t>(0, to - width)), static_cast<int>(to)};
    }
    const int64_t from = std::clamp<int64_t>((start + end - width) / 2, 0, n - width);
    return {static_cast<int>(from), static_cast<int>(from + width)};
  }

  // The rows of the first of two rounds.
  void local_row(int64_t chunk) const {
    int32_t* list = row(chunk);
    list = write_context(list);
    const Range w = window(chunk);
    for (int k = w.from; k < w.to; ++k)
      if (!padded(k)) *list++ = k;
    std::fill(list, row(chunk) + p_.list_length, -1);
  }

  void chunks(SelectScratch<T>& s, int64_t begin, int64_t end) const {
    const int64_t batch = blocks_.two_steps ? 1 : s.batch;
    for (int64_t c = begin; c < end; c += batch) {
      const int64_t n = std::min(batch, end - c);
      std::fill_n<T*>(s.means, n * s.subgroups * s.Dp, T(0));  // of sub-groups without members, too
      for (int64_t i = 0; i < n; ++i) fill_members(s, c + i, i * s.subgroups), mean_queries(s, i * s.subgroups);
      if (blocks_.two_steps)
        choose_blocks(s);
      else
        all_keys(s);
      multiply_keys(s, n * s.subgroups);
      for (int64_t i = 0; i < n; ++i) select_row(s, c + i, i * s.subgroups);
    }
  }

 private:
  bool padded(int key) const { return padding_ && padding_[key]; }
  int32_t* row(int64_t chunk) const {
    return select_.lists + ((u_.b * p_.H + u_.h) * u_.n_chunks() + chunk) * p_.list_length;
  }
  int32_t* write_context(int32_t* list) const {
    for (int64_t k = blocks_.n_keys; k < p_.S; ++k) *list++ = static_cast<int32_t>(k);
    return list;
  }

  // f(row, positions, count) for the sub-groups of the chunk whose first one is in row `first`.
  template <class F>
  void each_subgroup(const SelectScratch<T>& s, int64_t first, F&& f) const {
    for (int64_t m = first; m < first + s.subgroups; ++m) {
      const int* position = s.members.data() + m * kSubgroup;
      const int count = static_cast<int>(std::find(position, position + kSubgroup, -1) - position);
      if (count > 0) f(m, position, count);
    }
  }

  // The queries of a chunk that choose: those that are no padding, or all where there are no others.
  void fill_members(SelectScratch<T>& s, int64_t chunk, int64_t first) const {
    const Chunk c = u_.chunks[chunk];
    int* members = s.members.data() + first * kSubgroup;
    std::fill_n(members, s.subgroups * kSubgroup, -1);
    const bool* padding = select_.query_padding ? select_.query_padding + u_.b * p_.L : nullptr;
    int n = 0;
    for (int i = 0; i < c.count; ++i)
      if (const int position = u_.position(c.start + i); !(padding && padding[position])) members[n++] = position;
    if (n == 0)
      for (int i = 0; i < c.count; ++i) members[i] = u_.position(c.start + i);
  }

  void mean_queries(SelectScratch<T>& s, int64_t first) const {
    each_subgroup(s, first, [&](int64_t m, const int* position, int count) {
      gather<T>(p_.query, u_, u_.h, position, count, static_cast<int>(p_.L), p_.D, s.queries, s.Dp);
      T* mean = s.means + m * s.Dp;
      for (int i = 0; i < count; ++i) add_row<T>(mean, s.queries + i * s.Dp, s.Dp, T(1) / count);
      s.largest[m] = p_.has(kCausal) ? *std::max_element(position, position + count) : std::numeric_limits<int>::max();
    });
  }

  void all_keys(SelectScratch<T>& s) const {
    s.candidates.resize(blocks_.n_keys);
    std::iota(s.candidates.begin(), s.candidates.end(), 0);
  }

  // The keys of the blocks to which the chunk's queries give most weight.
  void choose_blocks(SelectScratch<T>& s) const {
    s.total.assign(blocks_.count, T(0));
    std::vector<T>& x = s.bias;
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
      for (int64_t b = 0; b < blocks_.count; ++b)
        s.total[b] += x[b] / sum + (b * kKeyBlock <= s.largest[m] && blocks_.sizes[b] ? kLeast<T> : T(0));
    });
    take_largest(s, kChosenBlocks);
    s.candidates.clear();
    for (int b : s.chosen)
      for (int64_t k = b * kKeyBlock; k < std::min((b + 1) * kKeyBlock, blocks_.n_keys); ++k)
        s.candidates.push_back(static_cast<int>(k));
  }

  // scores = means . candidates, and which of those are padding.
  void multiply_keys(SelectScratch<T>& s, int64_t rows) const {
    const int64_t n = s.candidates.size(), stride = round_up(n, kKeyBlock);
    s.scores.resize(rows * stride);
    s.padding.assign(stride, kMasked<T>);
    for (int64_t j = 0; j < n; ++j)
      if (!padded(s.candidates[j])) s.padding[j] = 0;
    s.prefetch.clear();
    s.prefetch.ready(s.Dp);
    for (int64_t k = 0; k < n; k += kKeyBlock) {
      const int count = static_cast<int>(std::min(kKeyBlock, n - k));
      gather<T>(p_.key, u_, u_.key_head, s.candidates.data() + k, count, static_cast<int>(p_.S), p_.D, s.keys, s.Dp);
      transpose_rows<T>(s.keys, s.Dp, count, p_.D, s.KT);
      product<T>(rows, round_up(count, kLanes<T>), s.scores.data() + k, stride, false,
                 [&]<int M, int N>(Vec<T>(&acc)[M][N], int64_t i0, int64_t j0) RK_LAMBDA {
                   multiply<T, false>(acc, s.means + i0 * s.Dp, s.Dp, s.KT + j0, kQueries, p_.D, s.prefetch);
                 });
    }
  }

  void select_row(SelectScratch<T>& s, int64_t chunk, int64_t first_row) const {
    const int64_t n = s.candidates.size(), stride = round_up(n, kKeyBlock);
    s.total.assign(n, T(0));
    each_subgroup(s, first_row, [&](int64_t m, const int* position, int count) {
      add_weights(s, position, count, s.scores.data() + m * stride, s.largest[m]);
    });
    int32_t* list = row(chunk);
    int64_t wanted = select_.budget - select_.local;
    Range local{0, 0};
    s.positions.clear();
    if (u_.R == 1) {
      local = window(chunk);
      list = write_context(list);
      for (int k = local.from; k < local.to; ++k)
        if (!padded(k)) s.positions.push_back(k);
      wanted = select_.budget - static_cast<int64_t>(s.positions.size());
    }
    for (int64_t j = 0; j < n; ++j)
      if (const int k = s.candidates[j]; padded(k) || (k >= local.from && k < local.to)) s.total[j] = 0;
    take_largest(s, wanted);
    for (int& j : s.chosen) j = s.candidates[j];
    list = std::merge(s.chosen.begin(), s.chosen.end(), s.positions.begin(), s.positions.end(), list);
    std::fill(list, row(chunk) + p_.list_length, -1);
  }

  // total += the softmax of a sub-group's scores, times the share of its queries to which the key is new.
  void add_weights(SelectScratch<T>& s, const int* position, int count, T* x, int largest) const {
    auto below = [&](int position) {
      return static_cast<int>(std::lower_bound(s.candidates.begin(), s.candidates.end(), position) -
                              s.candidates.begin());
    };
    const int n =
        largest == std::numeric_limits<int>::max() ? static_cast<int>(s.candidates.size()) : below(largest + 1);
    if (n == 0) return;
    const T scale = static_cast<T>(p_.scale * kLog2e);
    const T* bias = s.padding.data();
    if (rules_.any()) mean_bias(s, position, count, n), bias = s.bias.data();
    const int padded_n = static_cast<int>(round_up(n, kLanes<T>));
    Vec<T> tops = splat(kLowest<T>), sums{};
    for (int j = 0; j < padded_n; j += kLanes<T>) {
      Vec<T> y = load<T>(x + j) * splat(scale) + load<T>(bias + j);
      if (j + kLanes<T> > n)
        for (int i = n - j; i < kLanes<T>; ++i) y[i] = kMasked<T>;
      tops = maximum<T>(tops, y);
      store<T>(x + j, y);
    }
    T top = tops[0];
    for (int i = 1; i < kLanes<T>; ++i) top = std::max<T>(top, tops[i]);
    for (int j = 0; j < padded_n; j += kLanes<T>) {
      const Vec<T> e = exp2(load<T>(x + j) - splat(top));
      sums += e;
      store<T>(x + j, e);
    }
    const T total = sum<T>(sums);
    if (!(total > 0)) return;
    // Queries see new keys from the first candidate on, up to their own position and without their local window.
    s.steps.clear();
    auto step = [&](int from, int to, int by) {
      if (from < to) s.steps.emplace_back(from, by), s.steps.emplace_back(to, -by);
    };
    for (int i = 0; i < count; ++i) {
      const int to = p_.has(kCausal) ? below(position[i] + 1) : n;
      step(0, to, 1);
      if (u_.R == 1) continue;  // its whole chunk's window is left out later
      const Range w = window(position[i] / p_.chunk_length);
      step(std::min(below(w.from), to), std::min(below(w.to), to), -1);
    }
    std::sort(s.steps.begin(), s.steps.end());
    int queries = 0;
    for (size_t i = 0; i < s.steps.size(); ++i) {
      queries += s.steps[i].second;
      const int from = s.steps[i].first, to = i + 1 < s.steps.size() ? s.steps[i + 1].first : n;
      if (queries == 0 || from == to) continue;
      const T share = static_cast<T>(queries) / count, factor = share / total, least = share * kLeast<T>;
      T* sum_of = s.total.data();
      if (rules_.any()) {
        for (int j = from; j < to; ++j)
          if (bias[j] > kMasked<T>) sum_of[j] += x[j] * factor + least;
      } else {
        for (int j = from; j < to; ++j) sum_of[j] += x[j] * factor + least;
      }
    }
  }

  // The mean of what attn_mask adds for those queries that may see the key, and the log of their share.
  void mean_bias(SelectScratch<T>& s, const int* position, int count, int n) const {
    s.bias.assign(round_up(n, kLanes<T>), T(0));
    std::vector<int> seeing(n, 0);
    for (int i = 0; i < count; ++i) {
      for (int j = 0; j < n && !(p_.has(kCausal) && s.candidates[j] > position[i]); ++j) {
        const T mask = rules_.mask(position[i], s.candidates[j]);
        if (mask > kMasked<T>) s.bias[j] += mask, ++seeing[j];
      }
    }
    for (int j = 0; j < n; ++j)
      s.bias[j] = seeing[j] && s.padding[j] == 0
                      ? s.bias[j] / seeing[j] * static_cast<T>(kLog2e) + std::log2(T(seeing[j]) / count)
                      : kMasked<T>;
  }

  // chosen = the indices of the `wanted` largest positive totals, rising; of equal ones the first.
  void take_largest(SelectScratch<T>& s, int64_t wanted) const {
    s.chosen.clear();
    const int n = static_cast<int>(s.total.size());
    auto rank = [&](int j) { return std::bit_cast<uint32_t>(static_cast<float>(s.total[j])); };  // rises with it
    constexpr int kBins = 2048, kShift = 20;
    std::vector<int> bins(kBins, 0);
    for (int j = 0; j < n; ++j) ++bins[rank(j) >> kShift];
    const int zeros = bins[0];  // and what is too small to tell from it
    wanted = std::min<int64_t>(wanted, n - zeros);
    if (wanted <= 0) return;
    int bin = kBins - 1;
    int64_t above = 0;
    while (above + bins[bin] < wanted) above += bins[bin--];
    std::vector<int> border;
    for (int j = 0; j < n; ++j) {
      const int of = static_cast<int>(rank(j) >> kShift);
      if (of > bin) s.chosen.push_back(j);
      if (of == bin) border.push_back(j);
    }
    auto better = [&](int a, int b) { return rank(a) != rank(b) ? rank(a) > rank(b) : a < b; };
    const int64_t rest = wanted - above;
    if (rest < static_cast<int64_t>(border.size()))
      std::nth_element(border.begin(), border.begin() + rest, border.end(), better);
    s.chosen.insert(s.chosen.end(), border.begin(), border.begin() + rest);
    std::sort(s.chosen.begin(), s.chosen.end());
  }

  const SelectParams& select_;
  const AttentionParams& p_;
  const Unit& u_;
  const PairRules<T>& rules_;
  KeyBlocks<T>& blocks_;
  const bool* padding_;
};

template <class T>
void select_keys(const SelectParams& select, const Threads& threads) {
  const AttentionParams& given = select.attention;
  for_each_unit<T, SelectScratch<T>>(given, threads, [&](Shared<T>& shared, auto&& parallel) {
    const Unit& u = shared.unit;
    const AttentionParams p = shared.half.widen(given, u, {kQueryRows, kKeyRows}, {}, parallel);
    KeyBlocks<T> blocks;
    blocks.n_keys = p.S - p.context_keys;
    blocks.count = (blocks.n_keys + kKeyBlock - 1) / kKeyBlock;
    blocks.two_steps = blocks.n_keys > kExactKeys && !shared.rules->any();
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
            if (p.padding && p.padding[u.b * p.S + k]) continue;
            add_row<T>(mean, p.key.at<T>(u.b, u.key_head, k), p.D);
            ++n;
          }
          blocks.sizes[b] = n;
          if (n) add_row<T>(mean, mean, Dp, T(1) / n, T(0));
        }
      });
    }
    const Selection<T> selection(select, p, shared, blocks);
    if (u.R > 1)
      parallel(0, u.round_begin[1], [&](auto&, int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) selection.local_row(c);
      });
    parallel(u.round_begin[u.R - 1], u.round_begin[u.R],
             [&](SelectScratch<T>& s, int64_t begin, int64_t end) { selection.chunks(s, begin, end); });
  });
}

}  // namespace rk::cpu::RK_ISA
