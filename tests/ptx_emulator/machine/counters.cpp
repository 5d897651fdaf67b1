// Coalescing of global accesses into sectors and of shared ones into wavefronts.
#include "counters.h"

#include <algorithm>
#include <bit>

#include "program.h"

namespace emulation {
namespace {

constexpr int kSectorBytes = 32;
constexpr int kBanks = 32;
constexpr int kBankBytes = 4;

// The distinct values of f(address) over some lanes.
template <class F>
int distinct(const uint64_t* addresses, uint32_t lanes, F f) {
  uint64_t values[kLanes];
  int count = 0;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) values[count++] = f(addresses[std::countr_zero(rest)]);
  if (!std::is_sorted(values, values + count)) std::sort(values, values + count);
  return static_cast<int>(std::unique(values, values + count) - values);
}

// The largest number of distinct words in one bank.
int conflicts(const uint64_t* addresses, uint32_t lanes, int bytes) {
  uint64_t words[kBanks][kLanes];
  int counts[kBanks] = {}, most = 0;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const uint64_t first = addresses[std::countr_zero(rest)] / kBankBytes;
    for (int i = 0; i < std::max(1, bytes / kBankBytes); ++i) {
      const uint64_t word = first + i;
      uint64_t* const known = words[word % kBanks];
      int& count = counts[word % kBanks];
      if (std::find(known, known + count, word) != known + count) continue;
      known[count++] = word;
      most = std::max(most, count);
    }
  }
  return most;
}

}  // namespace

void Counters::count_global(const uint64_t* addresses, uint32_t lanes, int bytes) {
  if (lanes == 0) return;
  const int accesses = distinct(addresses, lanes, [](uint64_t address) { return address; });
  ++global_requests;
  global_sectors += distinct(addresses, lanes, [](uint64_t address) { return address / kSectorBytes; });
  ideal_sectors += (accesses * bytes + kSectorBytes - 1) / kSectorBytes;
  global_bytes += std::popcount(lanes) * bytes;
}

// The hardware serves at most 128 bytes at once: a warp's accesses of 8 bytes in two halves, of 16 in four quarters.
void Counters::count_shared(const uint64_t* addresses, uint32_t lanes, int bytes) {
  const int lanes_at_once = bytes <= kBankBytes ? kLanes : kBanks * kBankBytes / bytes;
  const uint32_t first_lanes = kAllLanes >> (kLanes - lanes_at_once);
  for (int lane = 0; lane < kLanes; lane += lanes_at_once) {
    const uint32_t served = lanes & (first_lanes << lane);
    if (served == 0) continue;
    shared_wavefronts += conflicts(addresses, served, bytes);
    ++ideal_wavefronts;
  }
}

}  // namespace emulation
