// Which keys each chunk of queries attends: its local window, and the keys to which its queries give most weight.
//
// The weights are those of the mean queries of its sub-groups: each one's softmax over the keys, times the share of its
// queries to which a key is new. One kernel weighs the candidates of chunks, in two walks over their tiles, and writes
// totals of each chunk; another one takes the largest. Of many keys blocks come first, weighed by their mean keys.
#pragma once
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/scan.cuh"
#include "kernels/cuda/tiles.cuh"

namespace rk::cuda {

constexpr float kSelectLeast = 1e-30f;  // a weight too small for a float still beats a key that is not to be taken

// Of the mean query of a sub-group: it sees keys up to this position, and stands for so many queries.
struct SelectFacts {
  int largest, count;
};

struct SelectArguments {
  Rows query, key;
  const int32_t* order;                 // [B, H, R * L] or null
  const bool *query_padding, *padding;  // [B, L] and [B, S], or null
  int32_t* members;                     // [B, H, L]: of each chunk the positions of the queries that choose
  SelectFacts* facts;                   // [B, H, chunks, sub-groups]
  float* means;                         // [B, H, chunks, sub-groups, width]
  float* block_means;                   // [B, key heads, blocks, width]
  int32_t* block_sizes;                 // [B, key heads, blocks]: keys that are no padding
  int64_t heads;                        // B * H
  int L, S, R, H, group, D, chunk_length, chunks, subgroup, keys, blocks, width;
  int wanted;  // keys (or blocks) of a list, less the local window; -1: as many as that says
  float scale;
  bool causal;

  // What is weighed:
  Rows candidates;         // keys, or means of blocks
  int n, row_width;        // so many rows of a width
  int keys_per_candidate;  // positions of a row
  const int32_t* sizes;    // [B, key heads, n] of blocks, or null
  const int32_t* chosen;   // [B, H, chunks, n_chosen] blocks, which have the only candidates: rising, then -1; or null
  int n_chosen;
  bool aligned;        // rows can be read 16 bytes at a time
  float* totals;       // [chunks of a slice, stride]
  int64_t stride;      // whole tiles
  int64_t first_cta;   // of the slice
  int chunks_per_cta;  // of a block of threads that weighs
  // and what is taken:
  int context;       // keys that a list begins with
  bool with_window;  // of local keys, which follow
  int32_t* lists;    // [B, H, list_rows, list_length], from the first chunk's on
  int64_t list_rows;
  int list_length;
  const LocalWindow* windows;  // [B, chunks]

  __device__ LocalWindow window(int64_t b, int chunk) const { return windows[b * chunks + chunk]; }
  __device__ bool is_padded(int64_t b, int key) const { return padding && padding[b * S + key]; }
  // Candidates that are seen up to a position.
  __device__ int seen(int position) const { return position < 0 ? 0 : min(position / keys_per_candidate, n - 1) + 1; }
};

// A chunk of a head.
struct SelectChunk {
  int64_t head, b;
  int h, key_head, chunk;

  // i: among the chunks of the slice
  __device__ void take(const SelectArguments& p, int64_t i) {
    const int64_t ctas = (p.chunks + p.chunks_per_cta - 1) / p.chunks_per_cta,
                  unit = p.first_cta + i / p.chunks_per_cta;
    head = unit / ctas, b = head / p.H, h = static_cast<int>(head % p.H), key_head = h / p.group;
    chunk = static_cast<int>(unit % ctas) * p.chunks_per_cta + static_cast<int>(i % p.chunks_per_cta);
  }
  __device__ int64_t row(const SelectArguments& p) const { return head * p.chunks + chunk; }
};

// How many of a list's entries come before the -1 that fill it up.
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

// A warp's sum of rows, and their mean, with zeros from the head size on.
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

// A warp for each chunk: its queries that choose (those that are no padding, or all where there are no others), and the
// mean queries of its sub-groups.
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

// A warp for each block of keys: the mean of those that are no padding, and how many they are.
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

// A lane's two rows g and g + 8 (see tiles.cuh) are sub-groups of one chunk; the other two are in the lane beside it,
// lane ^ 4.
struct SelectRow {
  SelectFacts facts;
  const int32_t* members;
  float top, sum;  // of the softmax so far, base 2; then its logarithm in `top`
};

// Shared memory: the mean queries of the block, in two parts for half types, then two tiles of candidates, and what is
// added to the scores of each.
template <class T, int K_STEPS, bool CHOSEN>
struct SelectWeights {
  using Layout = TileLayout<T, K_STEPS>;
  // Of 16 chunks each warp has 4 and all candidates of a tile; of a single chunk, each has a quarter of the candidates.
  static constexpr int kChunks = CHOSEN ? 1 : kSelectChunks, kOwnedRows = CHOSEN ? 16 : kAttentionRows;
  static constexpr int kColumns = CHOSEN ? 2 : 8;        // tiles of 8 candidates
  static constexpr int kParts = sizeof(T) == 2 ? 2 : 1;  // of a mean: high and low bits
  static constexpr int kOwnedBytes = kOwnedRows * Layout::kRowBytes;

  const SelectArguments& p;
  unsigned char* memory;
  float2 (&merged)[kAttentionThreads / kWarp][kSelectSubgroups];
  int (&furthest)[kAttentionThreads / kWarp];
  int warp, lane;
  SelectChunk first;  // of the block
  const int32_t* chosen;
  OwnedRows<T, K_STEPS, K_STEPS <= 4> means[kParts];
  SelectRow rows[2];

  __device__ unsigned char* owned_tile(int part) const { return memory + part * kOwnedBytes; }
  __device__ unsigned char* tile(int stage) const { return memory + kParts * kOwnedBytes + stage * Layout::kBytes; }
  __device__ float* bias(int stage) const { return reinterpret_cast<float*>(tile(2)) + stage * kAttentionRows; }
  __device__ int first_column() const { return CHOSEN ? warp * 16 : 0; }
  __device__ int column(int n, int j) const { return first_column() + n * 8 + lane % 4 * 2 + j; }
  // Of the block's chunks, the one of the warp's rows `row` and row ^ 1, row ^ 8; and which of its sub-groups.
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

  // The rows of the block, and what the lane knows of its two.
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

  // The largest position that a row of the block sees.
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
    float extra = -INFINITY;  // it is not to be taken
    if (candidate < p.n && p.sizes) {
      const int size = p.sizes[(first.b * (p.H / p.group) + first.key_head) * p.n + candidate];
      if (size > 0) extra = log2f(static_cast<float>(size));
    } else if (candidate < p.n && !p.is_padded(first.b, candidate)) {
      extra = 0.f;
    }
    bias(stage)[row] = extra;
  }

  // use(i, scores) for each tile: the lane's scores in base 2, -infinity for what is not to be taken.
  template <class Use>
  __device__ __forceinline__ void walk(int tiles, Use&& use) const {
    if (tiles > 0) load(0, 0), commit_copies();
    for (int i = 0; i < tiles; ++i) {
      const int stage = i % 2;
      wait_for_copies<0>();
      __syncthreads();  // the tile is there, and all are done with the one before
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
    __syncthreads();  // all are done with the last one
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

  // Of all lanes that share a row.
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
      if (!(sum > 0.f)) row.facts.count = 0;  // it sees nothing, or its scores are no numbers
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
    // Of the two lanes of a chunk, each writes half of the columns.
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

  // To which share of a sub-group's queries the lane's candidates of the tile are new.
  __device__ void find_shares(const SelectRow& row, int from, float (&shares)[kColumns][2]) const {
    const int to = from + kAttentionRows;
    int all = 0;  // queries to which the whole tile is new
#pragma unroll
    for (int n = 0; n < kColumns; ++n) shares[n][0] = shares[n][1] = 0.f;
    if (p.keys_per_candidate > 1 || !(p.causal || p.R > 1)) {
      all = row.facts.count;
    } else {
#pragma unroll 1  // one at a time, and from the last: other ways spill
      for (int i = row.facts.count; i-- > 0;) {
        const int position = row.members[i], last = p.causal ? position : INT32_MAX;
        // With one round the window of the whole chunk is left out when keys are taken.
        if (last < from) continue;
        const LocalWindow excluded_window = p.R > 1 ? p.window(first.b, position / p.chunk_length) : LocalWindow{};
        if (last >= to - 1 && (excluded_window.begin >= to || excluded_window.end <= from)) {
          ++all;
          continue;
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int key = from + column(n, j);
            if (key <= last && !(key >= excluded_window.begin && key < excluded_window.end)) shares[n][j] += 1.f;
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
__global__ void __launch_bounds__(kAttentionThreads, K_STEPS == 4 ? 3 : 2)
    select_weigh_kernel(const __grid_constant__ SelectArguments p) {
  RK_DYNAMIC_SHARED(memory);
  __shared__ float2 merged[kAttentionThreads / kWarp][kSelectSubgroups];
  __shared__ int furthest[kAttentionThreads / kWarp];
  SelectWeights<T, K_STEPS, CHOSEN> weights{
      p, memory, merged, furthest, int(threadIdx.x) / kWarp, int(threadIdx.x) % kWarp};
  weights.run();
}

}  // namespace rk::cuda
