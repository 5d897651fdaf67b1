// The kernels with their own launchers, without Python, for sanitizers: all orders, buffers of exact sizes.
//
//   kernels_main [hash|order|attention|lists|select|gather]   or else all of them; exit status: see drivers.h
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "attention_checks.h"
#include "drivers.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.h"
#include "select_checks.h"

namespace {

using rk::cuda::bf16;
using rk::cuda::Device;
using rk::cuda::fp16;

constexpr Device kH100{132, 232448, 233472};
constexpr Device kOne{1, 80000, 81920};       // one multiprocessor: few blocks, each with much to do
constexpr Device kLittle{132, 69872, 81920};  // little shared memory: 30000 keys are sorted in parts, by few warps
constexpr int32_t kUnwritten = -9;

// Of shared memory a block has what the plan was told.
void limit_shared(const Device& device) {
  rk::host::settings().shared_limit = device.shared_bytes_per_block - rk::cuda::kReservedShared;
}

// A problem is here for the way that its plan goes.
bool is_meant(bool plan_is_as_meant) {
  if (!plan_is_as_meant) std::puts("the plan is another one than the problem is meant for");
  return plan_is_as_meant;
}

// ---- hash

struct HashProblem {
  int64_t L, D, B = 1, H = 1, R = 2;
  std::vector<int64_t> factors = {32, 16};
  bool padded = false;
  bool shared = false;       // rotations of all heads are the same
  bool interleaved = false;  // x is [B, L, H, D] in memory, or else [B, H, L, D]
  int64_t skip = 0;          // elements before each row that are not part of it
  Device device = kH100;
  bool in_turns = false;  // a block has several tiles of tokens, and room for only some of its rotations
};

// Uniform in [-1, 1].
template <class T>
std::vector<T> random_numbers(int64_t count, std::minstd_rand& random) {
  std::vector<T> numbers(count);
  std::uniform_real_distribution<float> uniform(-1.f, 1.f);
  for (T& number : numbers) number = rk::cuda::from_float<T>(uniform(random));
  return numbers;
}

// Whether the bucket's digits are each of a largest projection of x, up to what float32 sums may differ by: that is
// derived in kernel_oracles.py. rotations: the first of the round and its first row.
template <class T>
bool digits_are_right(int64_t bucket, const T* x, const float* rotations, int64_t columns, const HashProblem& p) {
  if (bucket < 0) return false;
  for (const int64_t factor : p.factors) {
    const int64_t half = factor / 2, digit = bucket % factor;
    double largest = 0, chosen = 0, size = 0;
    for (int64_t column = 0; column < half; ++column) {
      double y = 0, size_of_y = 0;
      for (int64_t d = 0; d < p.D; ++d) {
        const double product = double{rk::cuda::to_float(x[d])} * rotations[d * columns + column];
        y += product, size_of_y += std::fabs(product);
      }
      largest = std::max(largest, std::fabs(y)), size = std::max(size, size_of_y);
      if (column == digit % half) chosen = digit < half ? y : -y;
    }
    const double allowed = 2. * (2. * p.D + 32) * std::numeric_limits<float>::epsilon() * size;
    if (chosen < largest - allowed) return false;
    bucket /= factor, rotations += half;
  }
  return bucket == 0;
}

template <class T>
constexpr rk::Element kElement = std::is_same_v<T, bf16>   ? rk::Element::kBFloat16
                                 : std::is_same_v<T, fp16> ? rk::Element::kFloat16
                                                           : rk::Element::kSame;

template <class T>
bool hash_is_right(const HashProblem& problem) {
  const auto& [L, D, B, H, R, factors, padded, shared, interleaved, skip, device, in_turns] = problem;
  std::minstd_rand random(L + D);
  const int64_t width = skip + D, columns_of_round = std::accumulate(factors.begin(), factors.end(), int64_t{0}) / 2;
  const int64_t columns = R * columns_of_round, heads_of_rotations = shared ? 1 : B * H;
  std::vector<T> x = random_numbers<T>(B * H * L * width, random);  // the last row ends where it ends
  const std::vector<float> rotations = random_numbers<float>(heads_of_rotations * D * columns, random);
  const auto padding = std::make_unique<bool[]>(B * L);
  for (int64_t i = 0; padded && i < B * L; ++i) padding[i] = random() % 3 == 0;
  std::vector<int32_t> buckets(B * H * R * L, kUnwritten);

  rk::HashParams p{};
  p.element = kElement<T>;
  p.B = B, p.H = H, p.L = L, p.D = D, p.R = R;
  p.x = {x.data() + skip, H * L * width, interleaved ? width : L * width, interleaved ? H * width : width};
  p.rotations = rotations.data();
  p.rotations_stride_b = shared ? 0 : H * D * columns, p.rotations_stride_h = shared ? 0 : D * columns;
  p.factors = factors.data(), p.n_factors = static_cast<int64_t>(factors.size());
  p.padding = padded ? padding.get() : nullptr;
  p.buckets = buckets.data();
  const rk::cuda::HashPlan plan = rk::cuda::plan_hash(p, device);
  const bool some_rotations = plan.resident_tiles < plan.rounds * plan.round_tiles;
  const bool tiles_of_tokens = plan.tokens_per_block > static_cast<int>(plan.launch.threads);
  if (!is_meant(some_rotations == in_turns && tiles_of_tokens == in_turns)) return false;
  limit_shared(device);
  if (rk::cuda::hash_buckets(p, device, nullptr) != 0) return false;

  const int64_t padding_bucket = std::accumulate(factors.begin(), factors.end(), int64_t{1}, std::multiplies<>());
  bool right = true;
  for (int64_t i = 0; i < B * H * R * L; ++i) {
    const int64_t token = i % L, round = i / L % R, h = i / L / R % H, b = i / L / R / H;
    const float* of_head = rotations.data() + b * p.rotations_stride_b + h * p.rotations_stride_h;
    right = right && (padding[b * L + token] ? buckets[i] == padding_bucket
                                             : digits_are_right(buckets[i], p.x.at<const T>(b, h, token),
                                                                of_head + round * columns_of_round, columns, problem));
  }
  return right;
}

template <class T>
void add_hash(std::vector<rk::host::Check>& checks, const std::string& type, const HashProblem& problem) {
  const std::string name = "hash " + type + " " + std::to_string(problem.L) + "x" + std::to_string(problem.D);
  checks.push_back({name, [problem] { return hash_is_right<T>(problem); }, true, problem.in_turns});
}

// Head sizes that are padded to 32, 64 and 128, so that every instance of the type runs.
template <class T>
void add_hashes(std::vector<rk::host::Check>& checks, const std::string& type) {
  add_hash<T>(checks, type, {.L = 70, .D = 32, .R = 3, .factors = {6, 10, 4}, .padded = true});
  add_hash<T>(checks, type, {.L = 33, .D = 40, .skip = 1});  // rows begin at no multiple of 16 bytes
  add_hash<T>(checks, type, {.L = 140, .D = 128, .factors = {128, 6}, .device = kOne, .in_turns = true});
}

// ---- order

struct OrderProblem {
  int64_t L, n_buckets, rows = 1, rounds = 1;
  std::vector<int32_t> cu_seqlens = {};
  Device device = kH100;
  int digits = 1;
  bool parts = false;
};

bool order_is_right(const OrderProblem& problem) {
  const auto& [L, n_buckets, rows, rounds, cu_seqlens, device, digits, parts] = problem;
  const std::vector<int32_t> bounds =
      cu_seqlens.empty() ? std::vector<int32_t>{0, static_cast<int32_t>(L)} : cu_seqlens;
  std::minstd_rand random(L);
  std::vector<int32_t> buckets(rows * rounds * L);
  for (int32_t& bucket : buckets) bucket = random() % 4 ? random() % n_buckets : n_buckets / 2;  // one has many
  buckets.front() = -1, buckets.back() = INT32_MAX;  // these count as the last
  std::vector<int32_t> order(buckets.size(), kUnwritten);

  rk::OrderParams p{};
  p.rows = p.heads = rows, p.rounds = rounds, p.L = L, p.n_buckets = n_buckets;
  p.buckets = buckets.data();
  p.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data();
  p.n_sequences = static_cast<int64_t>(bounds.size()) - 1;
  for (int64_t s = 0; s < p.n_sequences; ++s) p.longest = std::max<int64_t>(p.longest, bounds[s + 1] - bounds[s]);
  p.order = order.data();
  const rk::cuda::OrderPlan plan = rk::cuda::plan_order(p, device);
  if (!is_meant(plan.passes == digits && (plan.tiles > 1) == parts)) return false;
  std::vector<int32_t> scratch_order(plan.passes > 1 ? order.size() : 0, kUnwritten), counts(plan.counts(), kUnwritten);
  limit_shared(device);
  if (rk::cuda::bucket_order(p, device, scratch_order.data(), counts.data(), nullptr) != 0) return false;

  std::vector<int32_t> expected;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t s = 0; s < p.n_sequences; ++s)
      for (int64_t round = 0; round < rounds; ++round) {
        const int32_t* keys = buckets.data() + (row * rounds + round) * L + bounds[s];
        const auto key = [&](int32_t i) { return std::min<uint32_t>(keys[i], n_buckets - 1); };
        std::vector<int32_t> positions(bounds[s + 1] - bounds[s]);
        std::iota(positions.begin(), positions.end(), 0);
        std::stable_sort(positions.begin(), positions.end(), [&](int32_t i, int32_t j) { return key(i) < key(j); });
        expected.insert(expected.end(), positions.begin(), positions.end());
      }
  return order == expected;
}

void add_order(std::vector<rk::host::Check>& checks) {
  const OrderProblem problems[] = {
      {.L = 1, .n_buckets = 1},
      {.L = 300, .n_buckets = 65, .rows = 2, .rounds = 2},
      {.L = 300, .n_buckets = 20000, .digits = 2},
      {.L = 400, .n_buckets = 30, .rounds = 2, .cu_seqlens = {0, 1, 1, 301, 400}},
      {.L = 33000, .n_buckets = 20, .device = kLittle, .parts = true},
      {.L = 29100, .n_buckets = 1000, .cu_seqlens = {0, 100, 29100}, .device = kLittle, .digits = 2, .parts = true},
  };
  for (const OrderProblem& problem : problems)
    checks.push_back({"order " + std::to_string(problem.L) + " in " + std::to_string(problem.n_buckets),
                      [problem] { return order_is_right(problem); }, false, problem.parts});
}

// ---- gather

bool gather_is_right(int64_t vectors) {
  constexpr int64_t kInputRows = 50, kRows = 40;
  const int64_t words = 4 * vectors;
  std::minstd_rand random(1);
  std::vector<uint32_t> input(kInputRows * words), out(kRows * words, kUnwritten), expected(kRows * words);
  for (uint32_t& word : input) word = random();
  std::vector<int32_t> index(kRows);
  for (int32_t& i : index) i = static_cast<int32_t>(random() % 60) - 5;
  index[0] = kInputRows - 1, index[1] = kInputRows, index[2] = -1, index[3] = INT32_MAX, index[4] = INT32_MIN;
  for (int64_t row = 0; row < kRows; ++row)
    if (index[row] >= 0 && index[row] < kInputRows)
      std::copy_n(input.begin() + index[row] * words, words, expected.begin() + row * words);
  return rk::cuda::gather_rows({input.data(), index.data(), out.data(), kInputRows, kRows, vectors}, nullptr) == 0 &&
         out == expected;
}

void add_gather(std::vector<rk::host::Check>& checks) {
  for (const int64_t vectors : {3, 65})
    checks.push_back({"gather " + std::to_string(vectors), [vectors] { return gather_is_right(vectors); }, false});
}

}  // namespace

int main(int argc, char** argv) {
  const auto wanted = [&](const char* kernel) { return argc < 2 || std::strcmp(argv[1], kernel) == 0; };
  std::vector<rk::host::Check> checks;
  if (wanted("hash")) {
    add_hashes<bf16>(checks, "bfloat16");
    add_hashes<fp16>(checks, "float16");
    add_hashes<float>(checks, "float32");
    add_hash<bf16>(checks, "bfloat16", {.L = 33, .D = 64, .B = 2, .H = 2, .R = 1, .interleaved = true, .skip = 8});
    add_hash<fp16>(checks, "float16", {.L = 33, .D = 64, .H = 2, .R = 1, .shared = true});
  }
  if (wanted("order")) add_order(checks);
  if (wanted("attention")) rk::host::add_attention(checks);
  if (wanted("lists")) rk::host::add_lists(checks);
  if (wanted("select")) rk::host::add_select(checks);
  if (wanted("gather")) add_gather(checks);
  return rk::host::run_checks(checks);
}
