// Attention of chunks of 64 sorted positions to themselves and the chunk before, with a choice of mistakes.
#include "device.cuh"

namespace {

constexpr int kChunk = 64, kHeadDim = 64, kKeys = 2 * kChunk, kThreads = 128;
constexpr int kRowBytes = kHeadDim * sizeof(__nv_bfloat16);

struct Params {
  const __nv_bfloat16* qk;  // [B, L, kHeadDim]
  const __nv_bfloat16* v;   // [B, L, kHeadDim]
  const int* order;         // [B, L]: positions, sorted by bucket
  const int* buckets;       // [B, L]: in that order
  __nv_bfloat16* out;       // [B, L, kHeadDim], in that order
  float* lse;               // [B, L], base 2
  int length, chunks;
  float scale_log2;
};

// The keys of a block are its own chunk, whose rows are the queries too, then the chunk before.
struct Shared {
  unsigned char k[kKeys * kRowBytes];
  unsigned char v[kKeys * kRowBytes];
  float scales[kKeys];
  int positions[kKeys];
  int buckets[kKeys];
};

// Where 16-byte piece `piece` of a row lies: rows are permuted so that 8 of them meet no bank twice.
__device__ int place(int row, int piece) { return row * kRowBytes + ((piece ^ (row & 7)) << 4); }

// 8 threads fetch a row.
__device__ void fetch_rows(unsigned char* to, const __nv_bfloat16* from, const Shared& shared, int shift) {
#pragma unroll
  for (int first = 0; first < kKeys; first += kThreads / 8) {
    const int row = first + threadIdx.x / 8, piece = threadIdx.x % 8;
    copy_async(to + place(row, piece), from + int64_t(shared.positions[row] + shift) * kHeadDim + piece * 8);
  }
  commit_copies();
}

__device__ float scale_of_row(const Shared& shared, int row, float scale_log2) {
  float sum = 0;
#pragma unroll
  for (int piece = 0; piece < 8; ++piece) {
    const uint4 bits = *reinterpret_cast<const uint4*>(shared.k + place(row, piece));
    const auto* values = reinterpret_cast<const __nv_bfloat16*>(&bits);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += __bfloat162float(values[i]) * __bfloat162float(values[i]);
  }
  return rsqrtf(sum + 1e-6f) * scale_log2;
}

__device__ float masked(float score, int q_position, int k_position, int q_bucket, int k_bucket) {
  if (q_position == k_position) return -1e5f;
  return q_bucket != k_bucket || q_position < k_position ? -1e9f : score;
}

}  // namespace

// Grid (chunks, B). The 4 warps have 16 queries each; a thread has columns of rows `top` and `top` + 8.
__global__ void __launch_bounds__(kThreads) chunk_attention(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int chunk = blockIdx.x, b = blockIdx.y;
  const int chunk_before = chunk == 0 ? p.chunks - 1 : chunk - 1;
  const int64_t batch_start = int64_t(b) * p.length;
  const int64_t source = batch_start + (thread < kChunk ? chunk * kChunk : chunk_before * kChunk - kChunk) + thread;
  shared.positions[thread] = p.order[source];
  shared.buckets[thread] = p.buckets[source];
  if (kBug != 1) __syncthreads();
  fetch_rows(shared.k, p.qk + batch_start * kHeadDim, shared, kBug == 10 && b == 1 && chunk == 0);
  fetch_rows(shared.v, p.v + batch_start * kHeadDim, shared, 0);
  if (kBug != 5) wait_for_copies<1>();
  if (kBug != 2) __syncthreads();
  shared.scales[thread] = scale_of_row(shared, thread, p.scale_log2);
  if (kBug != 3) __syncthreads();

  uint32_t q[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) load_matrices(q[k], shared.k + place(warp * 16 + lane % 16, k * 2 + lane / 16));
  float s[kKeys / 8][4] = {};
#pragma unroll
  for (int n = 0; n < kKeys / 8; n += 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t keys[4];
      load_matrices(keys, shared.k + place(n * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
      multiply_add(s[n], q[k], keys[0], keys[1]);
      multiply_add(s[n + 1], q[k], keys[2], keys[3]);
    }
  }

  const int top = warp * 16 + lane / 4;
  float peak[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = top + i / 2 * 8, column = n * 8 + lane % 4 * 2 + i % 2;
      s[n][i] = masked(s[n][i] * shared.scales[column], shared.positions[row], shared.positions[column],
                       shared.buckets[row], shared.buckets[column + (kBug == 9 ? 8 : 0)]);
      peak[i / 2] = fmaxf(peak[i / 2], s[n][i]);
    }
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    peak[0] = fmaxf(peak[0], __shfl_xor_sync(0xffffffffu, peak[0], step));
    const uint32_t members = kBug == 12 && lane >= 16 ? 0xffff0000u : 0xffffffffu;
    peak[1] = fmaxf(peak[1], __shfl_xor_sync(members, peak[1], step));
  }
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = exp2_approximate(s[n][i] - peak[i / 2]);
      sum[i / 2] += s[n][i];
    }
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], step);
    sum[1] += __shfl_xor_sync(0xffffffffu, sum[1], step);
  }

  if (kBug != 13) wait_for_copies<0>();
  if (kBug != 4 && (kBug != 11 || warp < 2)) __syncthreads();
  float out[kHeadDim / 8][4] = {};
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    const float (&even)[4] = s[2 * k], (&odd)[4] = s[2 * k + 1];
    const uint32_t weights[4] = {pack(even[0], even[1]), pack(even[2], even[3]), pack(odd[0], odd[1]),
                                 pack(odd[2], odd[3])};
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      uint32_t values[4];
      const int misalignment = kBug == 14 ? 8 : 0;
      load_matrices_transposed(values, shared.v + place(k * 16 + lane % 16, n + lane / 16) + misalignment);
      multiply_add(out[n], weights, values[0], values[1]);
      multiply_add(out[n + 1], weights, values[2], values[3]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = batch_start + chunk * kChunk + top + half * 8;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const float low = out[n][2 * half] / sum[half], high = out[n][2 * half + 1] / sum[half];
      *reinterpret_cast<uint32_t*>(p.out + row * kHeadDim + n * 8 + lane % 4 * 2) = pack(low, high);
    }
    // 4 threads hold the same value: bug 15 has them all store it.
    if (lane % 4 == 0 || kBug == 15) p.lse[row] = peak[half] + log2f(sum[half]);
  }
}
