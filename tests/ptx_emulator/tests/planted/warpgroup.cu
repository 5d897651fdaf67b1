// A 64 x 64 product of bfloat16 matrices by one warpgroup, for sm_90a.
#include "device.cuh"

namespace {

constexpr int kSize = 64;
constexpr int kRowBytes = kSize * sizeof(__nv_bfloat16);  // the 128 bytes of the widest swizzle

struct Params {
  const __nv_bfloat16* a;  // [64, 64]: rows, k
  const __nv_bfloat16* b;  // [64, 64]: columns, k
  float* out;              // [64, 64]
};

// A matrix whose rows of 128 bytes lie one after the other, swizzled; 8 rows are 1,024 bytes.
__device__ uint64_t descriptor(const void* matrix, int k) {
  const uint64_t start = shared_address(matrix) + k * sizeof(__nv_bfloat16);
  return (start >> 4 & 0x3fff) | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ void load(unsigned char* to, const __nv_bfloat16* from) {
  for (int i = threadIdx.x; i < kSize * 8; i += blockDim.x) {
    const int row = i / 8, piece = i % 8;
    *reinterpret_cast<uint4*>(to + row * kRowBytes + ((piece ^ (row & 7)) << 4)) =
        reinterpret_cast<const uint4*>(from)[i];
  }
}

}  // namespace

__global__ void __launch_bounds__(128) warpgroup_product(const __grid_constant__ Params p) {
  __shared__ __align__(1024) unsigned char a[kSize * kRowBytes], b[kSize * kRowBytes];
  load(a, p.a);
  load(b, p.b);
  __syncthreads();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  float d[32] = {};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < kSize; k += 16) {
    asm volatile(
        "{.reg .pred accumulate; setp.ne.b32 accumulate, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
        " %32, %33, accumulate, 1, 1, 0, 0;}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(descriptor(a, k)), "l"(descriptor(b, k)), "r"(k));
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  for (int i = 0; i < 32; ++i) {
    p.out[(row + i / 2 % 2 * 8) * kSize + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}
