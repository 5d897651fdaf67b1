// Chunk attention, backward: one round of either pass, added in place to what earlier ones left. No sum is shared
// between blocks, so results do not depend on when they run.
//
//   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)   with S = factor q . k
//   of a query: dQ = sum dS factor k       of a key: dV = sum P dO, dK = sum dS q
//
// A shared row's gradient is that of its query and, through the Jacobian of the unit key, that of its key. With
// dropout P of dV is the dropped one and dP = drop * (dO V^T).
#pragma once
#include "kernels/cuda/attention.cuh"

namespace rk::cuda {

// Whether a key is below the limit of a query and not among those that it leaves out.
__device__ __forceinline__ bool is_allowed(int key, int limit, int excluded, int excluded_count) {
  return key < limit && static_cast<uint32_t>(key - excluded) >= static_cast<uint32_t>(excluded_count);
}

__device__ __forceinline__ float weight_of(float score, float factor, const QueryResidual& residual, float bias) {
  // One that sees only itself has exactly the weight 1 / times.
  return exp2_approximate((residual.self_only ? -residual.lse : fmaf(score, factor, -residual.lse)) + bias);
}

// The queries that a warp owns: the gradient of their rows.
template <class T, int STEPS>
struct AttentionGradQuery : AttentionBlock<T, STEPS, 2, QueryFacts, KeyFacts> {
  using Block = AttentionBlock<T, STEPS, 2, QueryFacts, KeyFacts>;
  using Block::lane, Block::p, Block::sequence, Block::warp;
  static constexpr int kColumns = 2 * STEPS, kAtOnce = 2;  // tiles of 8

  OwnRows<T, STEPS, true> queries, grads;
  int position[2], limit[2], excluded[2], excluded_count[2], first[2], last[2], slot[2];
  QueryResidual residual[2];
  float grad[kColumns][4];

  __device__ void run() {
    Block::walk(
        1,
        [&](int slot, int count) {
          Block::load_queries(p.lead ? nullptr : Block::own_tile(0), Block::own_tile(1), Block::own_facts(), slot,
                              count);
          commit_copies();
        },
        [&](int slot, int place) {
          Block::load_keys(Block::tile(place, 0), Block::tile(place, 1), Block::facts(place), slot, kAttentionRows);
        },
        [&](int place, bool fresh, bool) {
          if (fresh) Block::fill_factors(Block::tile(place, 0), Block::facts(place));
          return fresh;
        },
        [&](int slot, int place, bool first_visit, const Visits& visits) {
          if (first_visit) begin(place);
          visit(slot, place, visits);
        },
        [&](int, int) { finish(); });
  }

  __device__ void begin(int place) {
    queries.take(p.lead ? Block::tile(place, 0) : Block::own_tile(0), warp, lane);
    grads.take(Block::own_tile(1), warp, lane);
    const QueryFacts& facts = Block::own_facts();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp * 16 + h * 8 + lane / 4;
      position[h] = facts.row[row], limit[h] = facts.limit[row], excluded[h] = facts.excluded[row];
      excluded_count[h] = facts.excluded_count[row];
      first[h] = facts.first[row], last[h] = facts.last[row], slot[h] = facts.slot[row];
      residual[h] = facts.residual[row];
    }
#pragma unroll
    for (int m = 0; m < kColumns; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) grad[m][j] = 0.f;
  }

  // The keys from `from` on.
  __device__ void visit(int from, int place, const Visits& visits) {
    const KeyFacts& facts = Block::facts(place);
    if (sequence.rules) Block::fill_bias(from, visits.slot, place);
    const bool all_see = visits.all_see(from);
    if (!all_see && !Block::any_sees({first[0], last[0]}, {first[1], last[1]}, from)) return;
#pragma unroll 1
    for (int block = 0; block < kAttentionRows; block += 8 * kAtOnce) {
      float s[kAtOnce][4] = {}, grad_weight[kAtOnce][4] = {};
      multiply_rows(s, queries, Block::tile(place, 0), block, warp, lane);
      multiply_rows(grad_weight, grads, Block::tile(place, 1), block, warp, lane);
      const uint32_t kept = Block::template kept_bits<4 * kAtOnce>(
          [&](int i) { return i & 2 ? slot[1] : slot[0]; },
          [&](int i) { return from + block + i / 4 * 8 + lane % 4 * 2 + i % 2 - (i & 2 ? first[1] : first[0]); });
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int column = block + n * 8 + lane % 4 * 2;
        const int2 keys = *reinterpret_cast<const int2*>(facts.position + column);
        const float2 factors = *reinterpret_cast<const float2*>(facts.factor + column);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int h = j / 2, key = j % 2 ? keys.y : keys.x, at = from + column + j % 2;
          const float factor = j % 2 ? factors.y : factors.x;
          const bool sees = is_allowed(key, limit[h], excluded[h], excluded_count[h]) &&
                            (all_see || (at >= first[h] && at < last[h]));
          const float bias = sequence.rules ? Block::bias(warp * 16 + h * 8 + lane / 4)[column + j % 2] : 0.f;
          const float weight = sees ? weight_of(s[n][j], factor, residual[h], bias) : 0.f;
          float grad_of = grad_weight[n][j];
          if (p.dropout) grad_of *= kept >> (4 * n + j) & 1 ? p.keep_factor : 0.f;
          s[n][j] = weight * (grad_of - residual[h].delta) * factor;
        }
      }
      multiply_columns<T, STEPS>(grad, s, Block::tile(place, 0), block, lane);
    }
  }

  __device__ void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T* to = row_of<T>(p.grad_query, sequence.b, sequence.h, sequence.offset + max(position[h], 0));
      const bool add = p.round > 0 || p.grad_query_begun;
      Block::write_row(to, p.D, position[h] != kNobody, add, add ? 1.f : 0.f,
                       [&](int m, int j) { return grad[m][2 * h + j] * kLn2; });
    }
  }
};

// The keys that a warp owns: the gradients of their rows and their values.
template <class T, int STEPS>
struct AttentionGradKeys : AttentionBlock<T, STEPS, 2, KeyFacts, QueryFacts> {
  using Block = AttentionBlock<T, STEPS, 2, KeyFacts, QueryFacts>;
  using Block::lane, Block::p, Block::sequence, Block::warp;
  static constexpr int kColumns = 2 * STEPS, kAtOnce = 2;  // tiles of 8

  OwnRows<T, STEPS, STEPS != 8> keys, values;
  float grad_key[kColumns][4], grad_value[kColumns][4];

  __device__ void run() {
    Block::walk(
        p.lists ? 1 : p.group,
        [&](int from, int count) {
          Block::load_keys(p.lead ? nullptr : Block::own_tile(0), Block::own_tile(1), Block::own_facts(), from, count);
          commit_copies();
        },
        [&](int from, int place) {
          Block::load_queries(Block::tile(place, 0), Block::tile(place, 1), Block::facts(place), from, kAttentionRows);
        },
        [&](int place, bool, bool first) {
          if (first) Block::fill_factors(own_keys(place), Block::own_facts());
          return first;
        },
        [&](int from, int place, bool first, const Visits& visits) {
          if (first) begin(own_keys(place));
          visit(from, place, visits);
        },
        [&](int from, int count) { finish(from, count); });
  }

  // The first visit is that of the tile whose rows the keys are, if there is one.
  __device__ unsigned char* own_keys(int place) const { return p.lead ? Block::tile(place, 0) : Block::own_tile(0); }

  __device__ void begin(unsigned char* tile) {
    keys.take(tile, warp, lane);
    values.take(Block::own_tile(1), warp, lane);
#pragma unroll
    for (int m = 0; m < kColumns; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) grad_key[m][j] = grad_value[m][j] = 0.f;
  }

  // The queries from `from` on.
  __device__ void visit(int from, int place, const Visits& visits) {
    const QueryFacts& facts = Block::facts(place);
    if (sequence.rules) Block::fill_bias(from, visits.slot, place);
#pragma unroll 1
    for (int block = 0; block < kAttentionRows; block += 8 * kAtOnce) {
      float s[kAtOnce][4] = {}, grad_weight[kAtOnce][4] = {};
      multiply_rows(s, keys, Block::tile(place, 0), block, warp, lane);
      multiply_rows(grad_weight, values, Block::tile(place, 1), block, warp, lane);
      const bool all_see = visits.all_see(from);
      const int slot = visits.slot + warp * 16 + lane / 4;  // of the first of the lane's rows
      const auto query_of = [&](int i) { return block + i / 4 * 8 + lane % 4 * 2 + i % 2; };
      const uint32_t kept =
          Block::template kept_bits<4 * kAtOnce>([&](int i) { return facts.slot[query_of(i)]; },
                                                 [&](int i) { return slot + (i & 2) * 4 - facts.first[query_of(i)]; });
      int position[2];
      float factor[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // read again each time, for registers are scarce
        const int i = warp * 16 + h * 8 + lane / 4;
        position[h] = Block::own_facts().position[i], factor[h] = Block::own_facts().factor[i];
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = block + n * 8 + lane % 4 * 2 + i;
          const QueryResidual residual = facts.residual[column];
          const int limit = facts.limit[column], excluded = facts.excluded[column], first = facts.first[column];
          const int excluded_count = facts.excluded_count[column];
          const int last = facts.last[column];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int j = 2 * h + i;
            const bool sees = is_allowed(position[h], limit, excluded, excluded_count) &&
                              (all_see || (slot + 8 * h >= first && slot + 8 * h < last));
            const float bias = sequence.rules ? Block::bias(warp * 16 + h * 8 + lane / 4)[column] : 0.f;
            const float weight = sees ? weight_of(s[n][j], factor[h], residual, bias) : 0.f;
            float grad_of = grad_weight[n][j];
            s[n][j] = weight;
            if (p.dropout) {
              const float factor_of = kept >> (4 * n + j) & 1 ? p.keep_factor : 0.f;
              grad_of *= factor_of, s[n][j] *= factor_of;
            }
            grad_weight[n][j] = weight * (grad_of - residual.delta);
          }
        }
      multiply_columns<T, STEPS>(grad_value, s, Block::tile(place, 1), block, lane);
      multiply_columns<T, STEPS>(grad_key, grad_weight, Block::tile(place, 0), block, lane);
    }
  }

  __device__ void finish(int from, int count) {
    const bool later = p.round > 0;
    const auto own = [&](int h) { return warp * 16 + h * 8 + lane / 4; };
    // Each place of a list has gradients of its own.
    const int head = p.lists ? sequence.h : sequence.key_head;
    const auto row_to = [&](int h) {
      return p.lists ? from + own(h) : sequence.offset + Block::own_facts().row[own(h)];
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T* to = row_of<T>(p.grad_value, sequence.b, head, row_to(h));
      Block::write_row(to, p.E, own(h) < count, later, later ? 1.f : 0.f,
                       [&](int m, int j) { return grad_value[m][2 * h + j]; });
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float along = 0.f, inverse = 1.f;
      if (p.shared) {
        // key = query / length: its gradient is (g - query (g . query) / length^2) / length.
        float dot = 0.f, square = 0.f;
#pragma unroll
        for (int m = 0; m < kColumns; ++m) {
          const T* x = query_pair(m, h);
          const float a = to_float(x[0]), b = to_float(x[1]);
          dot = fmaf(a, grad_key[m][2 * h], fmaf(b, grad_key[m][2 * h + 1], dot));
          square = fmaf(a, a, fmaf(b, b, square));
        }
        dot = quad_sum(dot), square = quad_sum(square);
        inverse = 1.f / key_length(p, square);
        along = p.l2 && !(square > 1e-24f) ? 0.f : dot * inverse * inverse;
      }
      const float scale = p.scale * inverse;
      const int at = Block::own_facts().row[own(h)];
      const Rows& rows = p.shared ? p.grad_query : p.grad_key;
      T* to = row_of<T>(rows, sequence.b, head, row_to(h));
      // The other pass has written the gradients of queries.
      const bool more = later || (p.shared && at < sequence.n_queries);
      Block::write_row(to, p.D, own(h) < count, more, more ? 1.f : 0.f, [&](int m, int j) {
        const float x = p.shared ? to_float(query_pair(m, h)[j]) : 0.f;
        return scale * (grad_key[m][2 * h + j] - x * along);
      });
    }
  }
  __device__ const T* query_pair(int m, int h) const {
    return TileLayout<T, STEPS>::pair(keys.tile, warp * 16 + h * 8 + lane / 4, m * 8 + lane % 4 * 2);
  }
};

template <class T, int STEPS>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_grad_query_kernel(const __grid_constant__ AttentionArguments p) {
  run<AttentionGradQuery<T, STEPS>>(p, p.H);
}

template <class T, int STEPS>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_grad_keys_kernel(const __grid_constant__ AttentionArguments p) {
  run<AttentionGradKeys<T, STEPS>>(p, p.lists ? p.H : p.H / p.group);
}

__device__ __forceinline__ float element_of(const void* row, int i, Element element) {
  if (element == Element::kBFloat16) return to_float(static_cast<const bf16*>(row)[i]);
  if (element == Element::kFloat16) return to_float(static_cast<const fp16*>(row)[i]);
  return static_cast<const float*>(row)[i];
}

// A warp for each query.
__global__ void __launch_bounds__(kAttentionThreads, 8)
    attention_residual_kernel(const __grid_constant__ AttentionArguments p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t number = int64_t{blockIdx.x} * (kAttentionThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t head = number / p.n_queries, i = number % p.n_queries;
  if (head >= p.heads) return;
  const auto row = [&](const Rows& rows) {
    const int64_t offset = head / p.H * rows.stride_b + head % p.H * rows.stride_h + i * rows.stride_l;
    return static_cast<const char*>(rows.data) + offset * (p.element == Element::kSame ? 4 : 2);
  };
  const auto dot = [&](const Rows& x, const Rows& y, int width) {
    const char *a = row(x), *b = row(y);
    float sum = 0.f;
    for (int d = lane; d < width; d += kWarp) sum = fmaf(element_of(a, d, p.element), element_of(b, d, p.element), sum);
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  };
  const float delta = dot(p.out, p.grad_out, p.E);
  const bool self_only = p.self_only && p.self_only[number];
  float lse = p.lse[number] * kLog2e;
  if (lse == -INFINITY) lse = INFINITY;
  if (self_only) {
    // Where a key counts once, the bias of the pair has the number of times.
    const float square = dot(p.query, p.query, p.D), score = p.scale * square / key_length(p, square);
    lse = log2f(rintf(exp2f(lse - score * kLog2e)));
  }
  if (lane == 0) p.residuals[number] = {lse, delta, self_only};
}

}  // namespace rk::cuda
