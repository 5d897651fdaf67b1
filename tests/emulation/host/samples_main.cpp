// The sample kernels without Python, for sanitizers: all orders, buffers of exact sizes, one fault on request.
//
//   samples_main [fault]    exit status: see drivers.h
#include <cmath>
#include <cstring>
#include <vector>

#include "drivers.h"
#include "samples.h"

namespace {

using namespace rk::samples;

bool sums_are_right(Fault fault) {
  constexpr int kBlocks = 3;
  std::vector<int32_t> x(kBlocks * kSumThreads), sums(kBlocks, -1), expected(kBlocks);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<int32_t>(i * i % 97);
    expected[i / kSumThreads] += x[i];
  }
  return block_sums({x.data(), sums.data(), kBlocks, fault}) == 0 && sums == expected;
}

bool ranks_are_right(Fault fault) {
  const std::vector<int32_t> unwritten(kRankThreads, -1);
  std::vector<int32_t> keys(kRankThreads), results[4] = {unwritten, unwritten, unwritten, unwritten};
  for (int i = 0; i < kRankThreads; ++i) keys[i] = i * i % 11;
  const WarpRanks p{keys.data(), results[0].data(), results[1].data(), results[2].data(), results[3].data(), fault};
  if (warp_ranks(p) != 0) return false;
  for (int i = 0; i < kRankThreads; ++i) {
    int rank = 0, odd = 0, sum = 0;
    for (int other = i / 32 * 32; other < (i / 32 + 1) * 32; ++other) {
      rank += other < i && keys[other] == keys[i];
      odd += keys[other] % 2;
      sum += keys[other];
    }
    const int next = keys[i % 32 == 31 ? i : i + 1];
    if (results[0][i] != rank || results[1][i] != odd || results[2][i] != sum || results[3][i] != next) return false;
  }
  return true;
}

// Only for what sanitizers see of it.
bool words_are_computed() {
  std::vector<int32_t> x(32), shuffled(kShuffles * 32), words(kWords * 32), counters(kCounters);
  for (int i = 0; i < 32; ++i) x[i] = i * 7777777;
  return warp_words({x.data(), shuffled.data(), words.data(), counters.data(), 3, 16}) == 0;
}

bool doubled_is_right(Fault fault) {
  std::vector<float> x(3 * kDoubledTile - 6), y(x.size(), NAN);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  if (doubled({x.data(), y.data(), static_cast<int>(x.size()), fault}) != 0) return false;
  for (size_t i = 0; i < x.size(); ++i)
    if (y[i] != 2 * x[i]) return false;
  return true;
}

// Powers of two, so that a bfloat16 is its exponent and all sums are exact.
bool product_is_right(Fault fault) {
  constexpr int kM = 2 * kProductRows, kN = 2 * kProductColumns, kK = 2 * kProductDepth;
  const auto power = [](int i) { return i * i % 5 - 2; };
  const auto bits = [](int exponent) { return static_cast<uint16_t>((127 + exponent) << 7); };
  std::vector<uint16_t> a(kM * kK), b(kK * kN);
  std::vector<float> c(kM * kN, NAN);
  for (size_t i = 0; i < a.size(); ++i) a[i] = bits(power(static_cast<int>(i)));
  for (size_t i = 0; i < b.size(); ++i) b[i] = bits(power(static_cast<int>(i) + 1));
  if (product({a.data(), b.data(), c.data(), kM, kN, kK, true, fault}) != 0) return false;
  for (int row = 0; row < kM; ++row)
    for (int column = 0; column < kN; ++column) {
      float sum = 0;
      for (int k = 0; k < kK; ++k) sum += std::exp2(float(power(row * kK + k) + power(k * kN + column + 1)));
      if (c[row * kN + column] != sum) return false;
    }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  Fault fault = Fault::kNone;
  for (const auto& known : kFaults)
    if (argc > 1 && std::strcmp(argv[1], known.name) == 0) fault = known.fault;
  return rk::host::run_checks({
      {"block_sums", [=] { return sums_are_right(fault); }},
      {"warp_ranks", [=] { return ranks_are_right(fault); }},
      {"warp_words", words_are_computed},
      {"doubled", [=] { return doubled_is_right(fault); }},
      {"product", [=] { return product_is_right(fault); }},
  });
}
