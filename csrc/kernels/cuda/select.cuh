// Which keys each chunk of queries attends: its local window, and the keys to which its queries give most weight.
//
// A chunk is divided into sub-groups, and a mean query stands for each. The weight of a key is the sum over sub-groups
// of the mean query's softmax over the keys, times the share of the sub-group's queries to which the key is new:
// visible, and not in their local window. One kernel weighs the candidates of chunks, in two walks over their tiles,
// and writes a total for each. Another kernel takes the largest totals. If there are many keys, blocks of keys are
// chosen first, by their mean keys.
#pragma once
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/scan.cuh"
#include "kernels/cuda/tiles.cuh"

namespace rk::cuda {

// Added to weights, so that a weight of zero differs from a key that must not be taken.
constexpr float kSelectLeast = 1e-30f;

// Facts about the mean query of a sub-group.
struct SelectFacts {
  int largest;  // it sees keys up to this position
  int count;    // queries that it stands for
};

struct SelectArguments {
  Rows query, key;
  const int32_t* order;                 // [B, H, R * L] or null
  const bool *query_padding, *padding;  // [B, L] and [B, S], or null
  int32_t* members;                     // [B, H, L], by chunk: positions of the queries that choose its keys
  SelectFacts* facts;                   // [B, H, chunks, sub-groups]
  float* means;                         // [B, H, chunks, sub-groups, width]
  float* block_means;                   // [B, key heads, blocks, width]
  int32_t* block_sizes;                 // [B, key heads, blocks], how many keys are no padding
  int64_t heads;                        // B * H
  int L, S, R, H, group, D, chunk_length, chunks, subgroup, keys, blocks, width;
  int wanted;  // keys or blocks to take, besides the local window; -1: LocalWindow::most says it
  float scale;
  bool causal;

  // What is weighed.
  Rows candidates;  // [B, key heads, n, row_width]: keys, or means of blocks
  int n, row_width;
  int keys_per_candidate;  // 1, or those of a block
  const int32_t* sizes;    // [B, key heads, n], keys of each block; or null
  const int32_t* chosen;   // [B, H, chunks, n_chosen], blocks that have the candidates, rising, then -1; or null
  int n_chosen;
  bool aligned;        // rows can be read 16 bytes at a time
  float* totals;       // [chunks of a slice, stride]
  int64_t stride;      // candidates in whole tiles
  int64_t first_cta;   // of the slice
  int chunks_per_cta;  // whose candidates a CTA weighs

  // What is taken.
  int n_context;     // a list begins with so many context keys
  bool with_window;  // then comes the local window
  int32_t* lists;    // [B, H, list_rows, list_length]; begins at the list of the first chunk
  int64_t list_rows;
  int list_length;
  const LocalWindow* windows;  // [B, chunks]

  __device__ LocalWindow window(int64_t b, int chunk) const { return windows[b * chunks + chunk]; }
  __device__ bool is_padded(int64_t b, int key) const { return padding && padding[b * S + key]; }
  // How many candidates are seen from a position.
  __device__ int seen(int position) const { return position < 0 ? 0 : min(position / keys_per_candidate, n - 1) + 1; }
};

// One chunk of one head.
struct SelectChunk {
  int64_t head, b;
  int h, key_head, chunk;

  // i: number among the chunks of the slice
  __device__ void take(const SelectArguments& p, int64_t i) {
    const int64_t ctas = (p.chunks + p.chunks_per_cta - 1) / p.chunks_per_cta;  // of a head
    const int64_t cta = p.first_cta + i / p.chunks_per_cta;
    head = cta / ctas, b = head / p.H, h = static_cast<int>(head % p.H), key_head = h / p.group;
    chunk = static_cast<int>(cta % ctas) * p.chunks_per_cta + static_cast<int>(i % p.chunks_per_cta);
  }
  __device__ int64_t row(const SelectArguments& p) const { return head * p.chunks + chunk; }
};

// How many entries of a list come before the -1 that fill its end.
__device__ __forceinline__ int filled(const int32_t* list, int length) {
  int count = 0;
  for (int high = length; count < high;) {
    const int middle = (count + high) / 2;
    if (list[middle] >= 0)
      count = middle + 1;
    else
      high = middle;
  }
  return count;
}

// The sum of rows, spread over a warp, and their mean. The mean has zeros from the head size on.
struct RowSum {
  LaneRow sum{};

  template <class T>
  __device__ void add(const T* row, int width) {
    LaneRow::each(width, [&](int i, int d) { sum.x[i] += to_float(row[d]); });
  }
  __device__ void write_mean(float* mean, int width, int count) const {
    LaneRow::each(width, [&](int i, int d) { mean[d] = sum.x[i] / max(count, 1); });
  }
};

// Finds the queries of each chunk that choose its keys (those that are no padding, or all if there are no others), and
// the mean queries of its sub-groups. One warp for each chunk.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads, 8) select_means_kernel(const __grid_constant__ SelectArguments p) {
  const int64_t number = int64_t{blockIdx.x} * (kAttentionThreads / kWarp) + threadIdx.x / kWarp;
  if (number >= p.heads * p.chunks) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t head = number / p.chunks, b = head / p.H, h = head % p.H;
  const int64_t begin = number % p.chunks * p.chunk_length;
  const int slots = static_cast<int>(min(int64_t{p.chunk_length}, p.L - begin));
  const int32_t* order = p.order ? p.order + (head * p.R + p.R - 1) * p.L + begin : nullptr;
  int32_t* members = p.members + head * p.L + begin;
  const auto find_members = [&](const bool* padding) {
    int count = 0;
    for (int first = 0; first < slots; first += kWarp) {
      const int i = first + lane, at = i >= slots ? -1 : order ? order[i] : static_cast<int>(begin) + i;
      const bool chooses = at >= 0 && !(padding && padding[b * p.L + at]);
      const uint32_t votes = __ballot_sync(~0u, chooses);
      if (chooses) members[count + __popc(votes & ((1u << lane) - 1))] = at;
      count += __popc(votes);
    }
    return count;
  };
  int count = find_members(p.query_padding);
  if (count == 0) count = find_members(nullptr);
  __syncwarp();  // all members are written
  for (int i = 0; i < kSelectSubgroups; ++i, members += p.subgroup, count -= p.subgroup) {
    const int n = min(max(count, 0), p.subgroup);
    SelectFacts facts{-1, n};
    RowSum sum;
    for (int j = 0; j < n; ++j) {
      sum.add(row_of<T>(p.query, b, h, members[j]), p.D);
      facts.largest = p.causal ? max(facts.largest, members[j]) : INT32_MAX;
    }
    sum.write_mean(p.means + (number * kSelectSubgroups + i) * p.width, p.width, n);
    if (lane == 0) p.facts[number * kSelectSubgroups + i] = facts;
  }
}

// The mean of the keys of each block that are no padding, and how many they are. One warp for each block.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads, 8)
    select_blocks_kernel(const __grid_constant__ SelectArguments p) {
  const int64_t number = int64_t{blockIdx.x} * (kAttentionThreads / kWarp) + threadIdx.x / kWarp;
  const int key_heads = p.H / p.group;
  const int64_t head = number / p.blocks, b = head / key_heads;
  if (head >= p.heads / p.group) return;
  const int first = static_cast<int>(number % p.blocks) * kSelectBlock;
  int n = 0;
  RowSum sum;
  for (int key = first; key < min(first + kSelectBlock, p.keys); ++key) {
    if (p.is_padded(b, key)) continue;
    sum.add(row_of<T>(p.key, b, head % key_heads, key), p.D);
    ++n;
  }
  sum.write_mean(p.block_means + number * p.width, p.width, n);
  if (threadIdx.x % kWarp == 0) p.block_sizes[number] = n;
}

// One of a lane's two rows g and g + 8 (see tiles.cuh). They are two sub-groups of one chunk; lane ^ 4 has the other
// two.
struct SelectRow {
  SelectFacts facts;
  const int32_t* members;
  float top, sum;  // maximum and sum of the softmax, base 2; in the end `top` is its lse
};

// Shared memory holds the mean queries of the CTA (two parts of them for half types), two tiles of candidates, and a
// bias for each candidate.
template <class T, int K_STEPS, bool CHOSEN>
struct SelectWeights {
  using Layout = TileLayout<T, K_STEPS>;
  // With 16 chunks a warp has 4 of them and all candidates of a tile. With one chunk it has a quarter of the
  // candidates.
  static constexpr int kChunks = CHOSEN ? 1 : kSelectChunks, kOwnedRows = CHOSEN ? 16 : kAttentionRows;
  static constexpr int kColumns = CHOSEN ? 2 : 8;        // tiles of 8 candidates
  static constexpr int kParts = sizeof(T) == 2 ? 2 : 1;  // high and low bits of a mean
  static constexpr int kOwnedBytes = kOwnedRows * Layout::kRowBytes;

  const SelectArguments& p;
  unsigned char* memory;
  float2 (&merged)[kAttentionThreads / kWarp][kSelectSubgroups];
  int (&furthest)[kAttentionThreads / kWarp];
  int warp, lane;
  SelectChunk first;  // the CTA's first chunk
  const int32_t* chosen;
  OwnedRows<T, K_STEPS, K_STEPS <= 4> means[kParts];
  SelectRow rows[2];

  __device__ unsigned char* owned_tile(int part) const { return memory + part * kOwnedBytes; }
  __device__ unsigned char* tile(int stage) const { return memory + kParts * kOwnedBytes + stage * Layout::kBytes; }
  __device__ float* bias(int stage) const { return reinterpret_cast<float*>(tile(2)) + stage * kAttentionRows; }
  __device__ int first_column() const { return CHOSEN ? warp * 16 : 0; }
  __device__ int column(int n, int j) const { return first_column() + n * 8 + lane % 4 * 2 + j; }
  // The chunk (among those of the CTA) and the sub-group of a row of the warp. Rows row, row ^ 1 and row ^ 8 have the
  // same chunk.
  __device__ int chunk_of(int row) const { return (CHOSEN ? 0 : warp * 4) + row % 8 / 2; }
  __device__ static int subgroup_of(int row) { return row % 2 + row / 8 * 2; }
  __device__ bool has(int chunk) const { return chunk < kChunks && first.chunk + chunk < p.chunks; }
  __device__ int first_candidate(int tile) const { return (CHOSEN ? chosen[tile] : tile) * kAttentionRows; }

  __device__ void run() {
    first.take(p, int64_t{blockIdx.x} * kChunks);
    chosen = CHOSEN ? p.chosen + first.row(p) * p.n_chosen : nullptr;
    begin();
    const int tiles = CHOSEN ? filled(chosen, p.n_chosen) : (p.seen(last_seen()) + kAttentionRows - 1) / kAttentionRows;
    walk(tiles, [&](int, float (&x)[kColumns][4]) {
#pragma unroll
      for (int h = 0; h < 2; ++h) add_up(rows[h], h, x);
    });
    merge();
    walk(tiles, [&](int i, float (&x)[kColumns][4]) { write_totals(i, x); });
  }

  // Loads the rows of the CTA, and the facts of the lane's two rows.
  __device__ void begin() {
    for (int i = threadIdx.x; i < kOwnedRows * K_STEPS * 8; i += kAttentionThreads) {
      const int row = i / (K_STEPS * 8), d = i % (K_STEPS * 8) * 2;
      const int chunk = (CHOSEN ? 0 : row / 16 * 4) + row % 8 / 2;
      float2 mean = make_float2(0.f, 0.f);
      if (has(chunk) && d < p.width) mean = *reinterpret_cast<const float2*>(mean_of(chunk, subgroup_of(row % 16)) + d);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        T* to = Layout::pair(owned_tile(part), row, d);
        to[0] = from_float<T>(mean.x), to[1] = from_float<T>(mean.y);
        mean.x -= to_float(to[0]), mean.y -= to_float(to[1]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + 8 * h, chunk = chunk_of(row), subgroup = subgroup_of(row);
      rows[h] = {{-1, 0}, nullptr, -1e30f, 0.f};
      if (!has(chunk)) continue;
      rows[h].facts = p.facts[(first.row(p) + chunk) * kSelectSubgroups + subgroup];
      rows[h].members =
          p.members + first.head * p.L + int64_t{first.chunk + chunk} * p.chunk_length + subgroup * p.subgroup;
    }
    __syncthreads();
#pragma unroll
    for (int part = 0; part < kParts; ++part) means[part].take(owned_tile(part), CHOSEN ? 0 : warp, lane);
  }
  __device__ const float* mean_of(int chunk, int subgroup) const {
    return p.means + ((first.row(p) + chunk) * kSelectSubgroups + subgroup) * p.width;
  }

  // The largest position that any row of the CTA sees.
  __device__ int last_seen() const {
    const int largest = __reduce_max_sync(~0u, max(rows[0].facts.largest, rows[1].facts.largest));
    if (lane == 0) furthest[warp] = largest;
    __syncthreads();
    int last = -1;
    for (int i = 0; i < kAttentionThreads / kWarp; ++i) last = max(last, furthest[i]);
    return last;
  }

  __device__ void load(int i, int stage) const {
    const int from = first_candidate(i);
    load_tiles<K_STEPS, T>(p.aligned,
                           {tile(stage), row_of<T>(p.candidates, first.b, first.key_head, from), p.candidates.stride_l,
                            p.row_width, p.n - from},
                           {nullptr, nullptr, 0, 0, 0}, [](int row) { return row; });
    const int row = threadIdx.x, candidate = from + row;
    if (row >= kAttentionRows) return;
    float extra = -INFINITY;  // must not be taken
    if (candidate < p.n && p.sizes) {
      const int size = p.sizes[(first.b * (p.H / p.group) + first.key_head) * p.n + candidate];
      if (size > 0) extra = log2f(static_cast<float>(size));
    } else if (candidate < p.n && !p.is_padded(first.b, candidate)) {
      extra = 0.f;
    }
    bias(stage)[row] = extra;
  }

  // Calls use(i, scores) for each tile, with the lane's scores, base 2. -infinity: must not be taken.
  template <class Use>
  __device__ __forceinline__ void walk(int tiles, Use&& use) const {
    if (tiles > 0) load(0, 0), commit_copies();
    for (int i = 0; i < tiles; ++i) {
      const int stage = i % 2;
      wait_for_copies<0>();
      __syncthreads();  // the tile has arrived, and all threads are done with the previous one
      if (i + 1 < tiles) load(i + 1, stage ^ 1), commit_copies();
      float x[kColumns][4] = {};
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        multiply_rows<T, K_STEPS, K_STEPS <= 4, kColumns>(x, means[part], tile(stage), first_column(),
                                                          CHOSEN ? 0 : warp, lane);
      const int from = first_candidate(i);
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float extra = bias(stage)[column(n, j)];
          const int position = (from + column(n, j)) * p.keys_per_candidate;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& score = x[n][2 * h + j];
            const bool sees = extra > -INFINITY && position <= rows[h].facts.largest;
            score = sees ? fmaf(score, p.scale * kLog2e, extra) : -INFINITY;
          }
        }
      use(i, x);
    }
    __syncthreads();  // all threads are done with the last tile
  }

  __device__ void add_up(SelectRow& row, int h, const float (&x)[kColumns][4]) const {
    float top = row.top, sum = 0.f;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) top = fmaxf(top, fmaxf(x[n][2 * h], x[n][2 * h + 1]));
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
      sum += exp2_approximate(x[n][2 * h] - top) + exp2_approximate(x[n][2 * h + 1] - top);
    row.sum = fmaf(row.sum, exp2_approximate(row.top - top), sum);
    row.top = top;
  }

  // Merges the softmax of all lanes that share a row.
  __device__ void merge() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      SelectRow& row = rows[h];
      float top = quad_max(row.top);
      float sum = quad_sum(row.sum * exp2_approximate(row.top - top));
      if constexpr (CHOSEN) {
        const int subgroup = subgroup_of(lane / 4 + 8 * h);
        if (lane < 8 && lane % 4 == 0) merged[warp][subgroup] = make_float2(top, sum);
        __syncthreads();
        top = -1e30f, sum = 0.f;
        for (int i = 0; i < kAttentionThreads / kWarp; ++i) top = fmaxf(top, merged[i][subgroup].x);
        for (int i = 0; i < kAttentionThreads / kWarp; ++i)
          sum += merged[i][subgroup].y * exp2_approximate(merged[i][subgroup].x - top);
      }
      row.top = top + log2f(sum);
      if (!(sum > 0.f)) row.facts.count = 0;  // it sees nothing, or its scores are NaN
    }
  }

  __device__ void write_totals(int i, const float (&x)[kColumns][4]) const {
    float totals[kColumns][2] = {};
    const int from = first_candidate(i);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (rows[h].facts.count == 0) continue;
      float shares[kColumns][2];
      find_shares(rows[h], from, shares);
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float score = x[n][2 * h + j];
          const float weight = exp2_approximate(score - rows[h].top) + kSelectLeast;
          if (score > -INFINITY) totals[n][j] = fmaf(shares[n][j], weight, totals[n][j]);
        }
    }
    // Each of the two lanes of a chunk writes half of the columns.
    constexpr int kHalf = kColumns / 2;
    const bool upper = lane / 4 % 2;
    const int chunk = chunk_of(lane / 4);
    float* to = p.totals + (int64_t{blockIdx.x} * kChunks + chunk) * p.stride + int64_t{i} * kAttentionRows;
#pragma unroll
    for (int n = 0; n < kHalf; ++n) {
      float mine[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float other = __shfl_xor_sync(~0u, upper ? totals[n][j] : totals[n + kHalf][j], 4);
        mine[j] = (upper ? totals[n + kHalf][j] : totals[n][j]) + other;
      }
      if (has(chunk)) *reinterpret_cast<float2*>(to + column(n + upper * kHalf, 0)) = make_float2(mine[0], mine[1]);
    }
  }

  // The share of a sub-group's queries that have not yet seen each of the lane's candidates of the tile.
  __device__ void find_shares(const SelectRow& row, int from, float (&shares)[kColumns][2]) const {
    const int to = from + kAttentionRows;
    int all = 0;  // queries that have seen no key of the tile
#pragma unroll
    for (int n = 0; n < kColumns; ++n) shares[n][0] = shares[n][1] = 0.f;
    if (p.keys_per_candidate > 1 || !(p.causal || p.R > 1)) {
      all = row.facts.count;
    } else {
#pragma unroll 1  // one at a time, from the last: otherwise registers spill
      for (int i = row.facts.count; i-- > 0;) {
        const int position = row.members[i], last = p.causal ? position : INT32_MAX;
        // With one round, the chunk's window is left out when keys are taken.
        if (last < from) continue;
        const LocalWindow excluded = p.R > 1 ? p.window(first.b, position / p.chunk_length) : LocalWindow{};
        if (last >= to - 1 && (excluded.begin >= to || excluded.end <= from)) {
          ++all;
          continue;
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int key = from + column(n, j);
            if (key <= last && !(key >= excluded.begin && key < excluded.end)) shares[n][j] += 1.f;
          }
      }
    }
    const float count = static_cast<float>(row.facts.count);
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) shares[n][j] = (shares[n][j] + all) / count;
  }
};

template <class T, int K_STEPS, bool CHOSEN>
__global__ void __launch_bounds__(kAttentionThreads, K_STEPS <= 4 ? 3 : 2)
    select_weigh_kernel(const __grid_constant__ SelectArguments p) {
  RK_DYNAMIC_SHARED(memory);
  __shared__ float2 merged[kAttentionThreads / kWarp][kSelectSubgroups];
  __shared__ int furthest[kAttentionThreads / kWarp];
  SelectWeights<T, K_STEPS, CHOSEN> weights{
      p, memory, merged, furthest, int(threadIdx.x) / kWarp, int(threadIdx.x) % kWarp};
  weights.run();
}

}  // namespace rk::cuda
