// Chunk attention, backward: one round of one of the two passes, added in place to the result of earlier rounds. No sum
// is shared between thread blocks, so results do not depend on the order in which they run.
//
//   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)   where S = factor q . k
//   first pass, for each query: dQ = sum dS factor k
//   second pass, for each key: dV = sum P dO, dK = sum dS q
//
// With shared rows the gradient of a row is the sum of its gradient as a query and, through the Jacobian of the unit
// key, its gradient as a key. With dropout, dV has the dropped P, and dP = drop * (dO V^T).
#pragma once
#include "kernels/cuda/attention.cuh"

namespace rk::cuda {

// The first pass: gradients of the queries that the block owns.
template <class T, int K_STEPS>
struct AttentionGradQuery : AttentionBlock<T, K_STEPS, 2, QueryFacts, KeyFacts> {
  using Block = AttentionBlock<T, K_STEPS, 2, QueryFacts, KeyFacts>;
  using Block::lane, Block::p, Block::sequence, Block::warp;
  static constexpr int kColumns = 2 * K_STEPS, kAtOnce = 2;  // tiles of 8

  OwnedRows<T, K_STEPS, true> queries, grads;
  Query rows[2];  // of the lane
  float grad[kColumns][4];

  __device__ void run() {
    Block::walk_queries(
        Block::owned_tile(1), [&](int stage) { begin(stage); },
        [&](int slot, int stage, const TileRange& range) { visit(slot, stage, range); }, [&] { finish(); });
  }

  __device__ void begin(int stage) {
    queries.take(p.diagonal_first ? Block::tile(stage, 0) : Block::owned_tile(0), warp, lane);
    grads.take(Block::owned_tile(1), warp, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) rows[h] = Block::owned_facts().query[warp * 16 + h * 8 + lane / 4];
#pragma unroll
    for (int m = 0; m < kColumns; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) grad[m][j] = 0.f;
  }

  // Visits the tile of keys that begins at slot `from`.
  __device__ void visit(int from, int stage, const TileRange& range) {
    const KeyFacts& facts = Block::facts(stage);
    if (sequence.has_score_mod) Block::fill_score_mods(from, range.slot, stage);
    const bool all_see = range.all_see(from);
    if (!all_see && !Block::any_sees(rows[0].slots(), rows[1].slots(), from)) return;
    const uint32_t seen[2] = {all_see ? ~0u : rows[0].n_slots, all_see ? ~0u : rows[1].n_slots};
#pragma unroll 1
    for (int columns = 0; columns < kAttentionRows; columns += 8 * kAtOnce) {
      float s[kAtOnce][4] = {}, grad_weight[kAtOnce][4] = {}, factors[kAtOnce][2];
      multiply_rows(s, queries, Block::tile(stage, 0), columns, warp, lane);
      multiply_rows(grad_weight, grads, Block::tile(stage, 1), columns, warp, lane);
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int column = columns + n * 8 + lane % 4 * 2;
        const int2 keys = *reinterpret_cast<const int2*>(facts.key_position + column);
        const float2 both = *reinterpret_cast<const float2*>(facts.factor + column);
        factors[n][0] = both.x, factors[n][1] = both.y;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Query& query = rows[j / 2];
          const uint32_t at = from + column + j % 2 - query.first_slot;
          const bool sees = query.allows(j % 2 ? keys.y : keys.x) & (at < seen[j / 2]);
          s[n][j] = query.exponent(s[n][j], factors[n][j % 2], sees);
        }
      }
      if (sequence.has_score_mod)
        Block::add_score_mods(s, [&](int n, int j) {
          return Block::score_mods(warp * 16 + j / 2 * 8 + lane / 4)[columns + n * 8 + lane % 4 * 2 + j % 2];
        });
      if (p.dropout) {
        const uint32_t kept =
            Block::template kept_bits<4 * kAtOnce>([&](int i) { return i & 2 ? rows[1].slot : rows[0].slot; },
                                                   [&](int i) {
                                                     return from + columns + i / 4 * 8 + lane % 4 * 2 + i % 2 -
                                                            (i & 2 ? rows[1].first_slot : rows[0].first_slot);
                                                   });
        Block::drop(grad_weight, kept);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float weight = exp2_approximate(s[n][j]);
          s[n][j] = weight * (grad_weight[n][j] - rows[j / 2].delta) * factors[n][j % 2];
        }
      multiply_columns<T, K_STEPS>(grad, s, Block::tile(stage, 0), columns, lane);
    }
  }

  __device__ void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T* to = row_of<T>(p.grad_query, sequence.b, sequence.h, sequence.offset + max(rows[h].row, 0));
      const bool add = p.round > 0 || p.has(kRestKey);
      Block::write_row(to, p.D, rows[h].row != kNone, add, add ? 1.f : 0.f,
                       [&](int m, int j) { return grad[m][2 * h + j] * kLn2; });
    }
  }
};

// The second pass: gradients of the keys and values that the block owns.
template <class T, int K_STEPS>
struct AttentionGradKeys : AttentionBlock<T, K_STEPS, 2, KeyFacts, QueryFacts> {
  using Block = AttentionBlock<T, K_STEPS, 2, KeyFacts, QueryFacts>;
  using Block::lane, Block::p, Block::sequence, Block::warp;
  static constexpr int kColumns = 2 * K_STEPS, kAtOnce = 2;  // tiles of 8

  OwnedRows<T, K_STEPS, K_STEPS <= 4> keys, values;
  float grad_key[kColumns][4], grad_value[kColumns][4];

  __device__ void run() {
    Block::walk(
        p.lists ? 1 : p.group,
        [&](int from, int count) {
          Block::load_keys(p.diagonal_first ? nullptr : Block::owned_tile(0), Block::owned_tile(1),
                           Block::owned_facts(), from, count);
          commit_copies();
        },
        [&](int from, int stage) {
          Block::load_queries(Block::tile(stage, 0), Block::tile(stage, 1), Block::facts(stage), from, kAttentionRows);
        },
        [&](int stage, bool, bool first) {
          if (first) Block::fill_factors(owned_keys(stage), Block::owned_facts());
          return first;
        },
        [&](int from, int stage, bool first, const TileRange& range) {
          if (first) begin(owned_keys(stage));
          visit(from, stage, range);
        },
        [&](int from, int count) { finish(from, count); });
  }

  // The tile of the owned keys: that of the first visit, if the owned tile is among the visited ones.
  __device__ unsigned char* owned_keys(int stage) const {
    return p.diagonal_first ? Block::tile(stage, 0) : Block::owned_tile(0);
  }

  __device__ void begin(unsigned char* tile) {
    keys.take(tile, warp, lane);
    values.take(Block::owned_tile(1), warp, lane);
#pragma unroll
    for (int m = 0; m < kColumns; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) grad_key[m][j] = grad_value[m][j] = 0.f;
  }

  // Visits the tile of queries that begins at slot `from`.
  __device__ void visit(int from, int stage, const TileRange& range) {
    const QueryFacts& facts = Block::facts(stage);
    if (sequence.has_score_mod) Block::fill_score_mods(from, range.slot, stage);
#pragma unroll 1
    for (int columns = 0; columns < kAttentionRows; columns += 8 * kAtOnce) {
      float s[kAtOnce][4] = {}, grad_weight[kAtOnce][4] = {};
      multiply_rows(s, keys, Block::tile(stage, 0), columns, warp, lane);
      multiply_rows(grad_weight, values, Block::tile(stage, 1), columns, warp, lane);
      const bool all_see = range.all_see(from);
      const int slot = range.slot + warp * 16 + lane / 4;  // of the lane's first row
      const auto query_of = [&](int n, int j) -> const Query& {
        return facts.query[columns + n * 8 + lane % 4 * 2 + j % 2];
      };
      int position[2];
      float factor[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // read again for every block, because registers are scarce
        const int i = warp * 16 + h * 8 + lane / 4;
        position[h] = Block::owned_facts().key_position[i], factor[h] = Block::owned_facts().factor[i];
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Query query = query_of(n, i);
          const uint32_t seen = all_see ? ~0u : query.n_slots;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t at = slot + 8 * h - query.first_slot;
            float& x = s[n][2 * h + i];
            x = query.exponent(x, factor[h], query.allows(position[h]) & (at < seen));
          }
        }
      if (sequence.has_score_mod)
        Block::add_score_mods(s, [&](int n, int j) {
          return Block::score_mods(warp * 16 + j / 2 * 8 + lane / 4)[columns + n * 8 + lane % 4 * 2 + j % 2];
        });
      uint32_t kept = ~0u;
      if (p.dropout) {
        kept = Block::template kept_bits<4 * kAtOnce>(
            [&](int i) { return query_of(i / 4, i).slot; },
            [&](int i) { return slot + (i & 2) * 4 - query_of(i / 4, i).first_slot; });
        Block::drop(grad_weight, kept);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[n][j] = exp2_approximate(s[n][j]);
          grad_weight[n][j] = s[n][j] * (grad_weight[n][j] - query_of(n, j).delta);
        }
      if (p.dropout) Block::drop(s, kept);
      multiply_columns<T, K_STEPS>(grad_value, s, Block::tile(stage, 1), columns, lane);
      multiply_columns<T, K_STEPS>(grad_key, grad_weight, Block::tile(stage, 0), columns, lane);
    }
  }

  __device__ void finish(int from, int count) {
    const bool later = p.round > 0;
    const auto owned = [&](int h) { return warp * 16 + h * 8 + lane / 4; };
    // Every entry of a list has gradients of its own.
    const int head = p.lists ? sequence.h : sequence.key_head;
    const auto row_to = [&](int h) {
      return p.lists ? from + owned(h) : sequence.offset + Block::owned_facts().row[owned(h)];
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T* to = row_of<T>(p.grad_value, sequence.b, head, row_to(h));
      Block::write_row(to, p.E, owned(h) < count, later, later ? 1.f : 0.f,
                       [&](int m, int j) { return grad_value[m][2 * h + j]; });
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float along = 0.f, inverse = 1.f;
      if (p.shared_qk) {
        // With key = query / length the gradient is (g - query (g . query) / length^2) / length.
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
        along = p.has(kL2Norm) && !(square > 1e-24f) ? 0.f : dot * inverse * inverse;
      }
      const float scale = p.scale * inverse;
      const int at = Block::owned_facts().row[owned(h)];
      const Rows& rows = p.shared_qk ? p.grad_query : p.grad_key;
      T* to = row_of<T>(rows, sequence.b, head, row_to(h));
      // The first pass has already written the gradients of rows that are queries.
      const bool more = later || (p.shared_qk && at < sequence.n_queries);
      Block::write_row(to, p.D, owned(h) < count, more, more ? 1.f : 0.f, [&](int m, int j) {
        const float x = p.shared_qk ? to_float(query_pair(m, h)[j]) : 0.f;
        return scale * (grad_key[m][2 * h + j] - x * along);
      });
    }
  }
  __device__ const T* query_pair(int m, int h) const {
    return TileLayout<T, K_STEPS>::pair(keys.tile, warp * 16 + h * 8 + lane / 4, m * 8 + lane % 4 * 2);
  }
};

template <class T, int K_STEPS>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_grad_query_kernel(const __grid_constant__ AttentionArguments p) {
  run<AttentionGradQuery<T, K_STEPS>>(p, p.H);
}

template <class T, int K_STEPS>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_grad_keys_kernel(const __grid_constant__ AttentionArguments p) {
  run<AttentionGradKeys<T, K_STEPS>>(p, p.lists ? p.H : p.H / p.group);
}

__device__ __forceinline__ float element_of(const void* row, int i, Element element) {
  if (element == Element::kBFloat16) return to_float(static_cast<const bf16*>(row)[i]);
  if (element == Element::kFloat16) return to_float(static_cast<const fp16*>(row)[i]);
  return static_cast<const float*>(row)[i];
}

// Writes the residual of each query. One warp for each query.
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
    return warp_sum(sum);
  };
  const float delta = dot(p.out, p.grad_out, p.E);
  const bool self_only = p.self_only && p.self_only[number];
  float lse = p.lse[number] * kLog2e;
  if (lse == -INFINITY) lse = INFINITY;
  if (self_only) {
    // With dedup this is 0: the score_mod already divides by the number of times.
    const float square = dot(p.query, p.query, p.D), score = p.scale * square / key_length(p, square);
    lse = log2f(rintf(exp2f(lse - score * kLog2e)));
  }
  if (lane == 0) p.residuals[number] = {lse, delta, self_only};
}

}  // namespace rk::cuda
