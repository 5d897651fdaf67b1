// The multiply-add peak of n threads that keep everything in registers, in float32: prints JSON.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kAccumulators = 12;  // more than latency times throughput of any core, and 16 registers hold them
constexpr double kSeconds = 0.3;
constexpr int kTries = 3;

using Vector = float __attribute__((vector_size(kWidth * sizeof(float))));
using Clock = std::chrono::steady_clock;

static void fma_loop(double* gflops) {
  Vector factor, addend, sums[kAccumulators];
  for (int i = 0; i < kWidth; ++i) {
    factor[i] = 0.999f;
    addend[i] = 0.001f;
  }
  for (auto& sum : sums) sum = addend;
  // The compiler must not see that these are constants, or it computes the loop.
  asm volatile("" : "+m"(factor), "+m"(addend));
  constexpr long kBlock = 1 << 16;
  const auto start = Clock::now();
  long blocks = 0;
  double seconds = 0;
  while (seconds < kSeconds) {
    for (long i = 0; i < kBlock; ++i) {
#pragma GCC unroll 12
      for (int a = 0; a < kAccumulators; ++a) sums[a] = sums[a] * factor + addend;
    }
    ++blocks;
    seconds = std::chrono::duration<double>(Clock::now() - start).count();
  }
  Vector total = addend;
  for (auto& sum : sums) total += sum;
  volatile float sink = total[0];
  (void)sink;
  *gflops = 2.0 * kWidth * kAccumulators * double(kBlock) * double(blocks) / seconds * 1e-9;
}

static double best_of(int threads) {
  double best = 0;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    std::vector<double> each(threads);
    std::vector<std::thread> pool;
    for (auto& gflops : each) pool.emplace_back(fma_loop, &gflops);
    double sum = 0;
    for (int i = 0; i < threads; ++i) {
      pool[i].join();
      sum += each[i];
    }
    if (sum > best) best = sum;
  }
  return best;
}

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const int threads = std::atoi(argv[i]);
    std::printf("%s\"%d\": %.2f", i == 1 ? "{" : ", ", threads, best_of(threads));
  }
  std::printf("}\n");
}
