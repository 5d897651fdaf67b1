// Small kernels for the tests of the host's own machinery, each right or with a fault.
#pragma once
#include <cstdint>

namespace rk::samples {

enum class Fault {
  kNone,
  kNoBarrier,       // block_sums, product: a barrier is left out
  kDuplicateStore,  // block_sums: all threads store the sum
  kBlocksCollide,   // block_sums: all blocks store to the same place
  kSharedOverflow,  // block_sums: one more element than there is shared memory
  kDivergent,       // warp_ranks: lanes of one warp are at different collectives
  kLaneMissing,     // warp_ranks: a lane exits before a collective
  kWrongMask,       // warp_ranks: a lane is at a collective whose mask leaves it out
  kNoWait,          // doubled: copies are read before they were waited for
  kBeyondGlobal,    // doubled: a copy reads past the end of the input
  kBeyondShared,    // doubled: a copy writes past the end of shared memory
  kMisalignedCopy,  // doubled: a copy's global address is no multiple of 16
  kMisalignedRow,   // product: a matrix row does not begin at a multiple of 16
};

constexpr struct {
  const char* name;
  Fault fault;
} kFaults[] = {
    {"none", Fault::kNone},
    {"no_barrier", Fault::kNoBarrier},
    {"duplicate_store", Fault::kDuplicateStore},
    {"blocks_collide", Fault::kBlocksCollide},
    {"shared_overflow", Fault::kSharedOverflow},
    {"divergent", Fault::kDivergent},
    {"lane_missing", Fault::kLaneMissing},
    {"wrong_mask", Fault::kWrongMask},
    {"no_wait", Fault::kNoWait},
    {"beyond_global", Fault::kBeyondGlobal},
    {"beyond_shared", Fault::kBeyondShared},
    {"misaligned_copy", Fault::kMisalignedCopy},
    {"misaligned_row", Fault::kMisalignedRow},
};

// Each launcher returns a cudaError_t.

constexpr int kSumThreads = 64;

struct BlockSums {
  const int32_t* x;  // [blocks, kSumThreads]
  int32_t* sums;     // [blocks]
  int blocks;
  Fault fault;
};

int block_sums(const BlockSums& p);

constexpr int kRankThreads = 64;

struct WarpRanks {
  const int32_t* keys;  // [kRankThreads]
  int32_t* ranks;       // [kRankThreads]: lanes before this one, of its warp, with the same key
  int32_t* odd;         // [kRankThreads]: lanes of the warp with an odd key
  int32_t* sums;        // [kRankThreads]: of the warp's keys
  int32_t* next;        // [kRankThreads]: the next lane's key, the last lane's own
  Fault fault;
};

int warp_ranks(const WarpRanks& p);

constexpr int kShuffles = 5, kWords = 14, kCounters = 6;

// What one warp computes of a word a lane.
struct WarpWords {
  const int32_t* x;   // [32]
  int32_t* shuffled;  // [kShuffles, 32]: index, up, down, xor, and index with the even lanes only
  int32_t* words;     // [kWords, 32]: popc clz ffs brev, reductions add min max and or xor, any all, min max with 0
  int32_t* counters;  // [kCounters]: by atomics add min max and or exch, of all lanes
  int amount, width;  // of the shuffles
};

int warp_words(const WarpWords& p);

constexpr int kDoubledThreads = 32, kDoubledTile = 4 * kDoubledThreads;

struct Doubled {
  const float* x;  // [n], 16-byte aligned
  float* y;        // [n]
  int n;
  Fault fault;
};

int doubled(const Doubled& p);

constexpr int kProductRows = 16, kProductColumns = 8, kProductDepth = 32;  // of a tile

// c = a b, of types with 2 bytes and 16-byte aligned.
struct Product {
  const void* a;  // [M, K]
  const void* b;  // [K, N]
  float* c;       // [M, N]
  int M, N, K;    // multiples of a tile
  bool bfloat16;  // or else float16
  Fault fault;
};

int product(const Product& p);

}  // namespace rk::samples
