// Runs the CPU kernels on random cases, for sanitizers: every array has its exact size, and the instruction sets that
// this machine runs must agree. Usage: harness [cases] [seed]
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "kernels/cpu/standard.h"

// The source of the AVX-512 kernels with 64-byte vectors that the compiler splits, so that it runs on any machine.
#define RK_ISA wide
#define RK_VECTOR_BYTES 64
#define RK_TILE_VECTORS 4
#include "kernels/cpu/table.h"

namespace {

using namespace rk;

std::mt19937 generator;
int64_t pick(std::initializer_list<int64_t> values) { return values.begin()[generator() % values.size()]; }
int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(generator() % (high - low + 1)); }
bool chance(double p) { return generator() < p * 4294967296.0; }

cpu::Threads threads(int count) {
  return {count, [](int n, void (*body)(void*, int), void* context) {
            std::vector<std::thread> pool;
            for (int i = 1; i < n; ++i) pool.emplace_back(body, context, i);
            body(context, 0);
            for (auto& t : pool) t.join();
          }};
}

template <class T>
std::vector<T> normal(int64_t n) {
  std::normal_distribution<T> distribution;
  std::vector<T> x(n);
  for (auto& e : x) e = distribution(generator);
  return x;
}

// vector<bool> has no data()
struct Flags {
  explicit Flags(int64_t n, double p) : data(new bool[n]) {
    for (int64_t i = 0; i < n; ++i) data[i] = chance(p);
  }
  std::unique_ptr<bool[]> data;
};

template <class T>
struct Results {
  std::vector<T> out, lse, grad_query, grad_key, grad_value;
  std::unique_ptr<bool[]> self_only;
};

template <class T>
Results<T> run(const cpu::TypedKernels<T>& kernels, AttentionParams p, const std::vector<T>& grad_out, int n_threads) {
  const T poison = std::numeric_limits<T>::quiet_NaN();
  const int64_t rows = p.B * p.H * p.L, queries = p.B * p.H * p.n_queries;
  Results<T> r{std::vector<T>(queries * p.E, poison), std::vector<T>(queries, poison),
               std::vector<T>(rows * p.D, poison),    std::vector<T>(p.shared_qk() ? 0 : rows * p.D, poison),
               std::vector<T>(rows * p.E, poison),    std::unique_ptr<bool[]>(new bool[queries])};
  auto view = [&](const T* data, int64_t L, int64_t width) {
    return Rows{const_cast<T*>(data), p.H * L * width, L * width, width};
  };
  p.out = view(r.out.data(), p.n_queries, p.E), p.lse = r.lse.data(), p.self_only = r.self_only.get();
  kernels.forward(p, threads(n_threads));
  p.grad_out = view(grad_out.data(), p.n_queries, p.E);
  p.grad_query = view(r.grad_query.data(), p.L, p.D), p.grad_value = view(r.grad_value.data(), p.L, p.E);
  if (!p.shared_qk()) p.grad_key = view(r.grad_key.data(), p.L, p.D);
  kernels.backward(p, threads(n_threads));
  return r;
}

template <class T>
void compare(const char* what, const std::vector<T>& a, const std::vector<T>& b, double tolerance) {
  T largest = 1;
  for (T x : a)
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;  // also -inf
    if (std::abs(a[i] - b[i]) <= tolerance * largest) continue;
    std::printf("%s[%zu]: %g and %g\n", what, i, double(a[i]), double(b[i]));
    std::exit(1);
  }
}

template <class T>
void same(const Results<T>& expected, const Results<T>& r, double tolerance) {
  compare("out", expected.out, r.out, tolerance), compare("lse", expected.lse, r.lse, tolerance);
  compare("grad_query", expected.grad_query, r.grad_query, tolerance);
  compare("grad_key", expected.grad_key, r.grad_key, tolerance);
  compare("grad_value", expected.grad_value, r.grad_value, tolerance);
}

template <class T>
void attention_case(const cpu::TypedKernels<T> cpu::Kernels::* type, const cpu::TypedKernels<T>& wide) {
  AttentionParams p{};
  p.B = between(1, 2), p.H = p.key_heads = between(1, 3), p.S = p.L = pick({1, 2, 7, 16, 63, 64, 65, 100, 130});
  p.D = pick({1, 3, 8, 16, 17, 64, 70}), p.E = chance(0.7) ? p.D : pick({1, 5, 33});
  const bool shared = chance(0.7), packed = chance(0.3), own_bounds = packed && chance(0.7);
  p.R = shared ? between(1, 4) : 1;
  p.chunk_length = pick({1, 3, 8, 16, 64, 100}), p.chunks_before = between(0, 2), p.chunks_after = between(0, 2);
  p.n_queries = chance(0.8) ? p.L : between(0, p.L);
  p.flags = (chance(0.5) ? kCausal : 0) | (chance(0.3) ? kL2Norm : 0) | (chance(0.2) ? kMaskPaddedQueries : 0) |
            (shared && chance(0.3) ? kWithinBucket : 0) | (chance(0.2) ? kDedup : 0) |
            (shared && chance(0.3) ? kBucketAligned : 0);
  p.scale = 0.7;
  const int64_t seed = static_cast<int64_t>(generator());
  p.keep_factor = chance(0.3) ? 1.25 : 1.0, p.drop_threshold = 858993459u, p.dropout_seed = &seed;
  const int64_t heads = p.B * p.H;
  const auto query = normal<T>(heads * p.L * p.D), key = normal<T>(shared ? 0 : heads * p.L * p.D),
             value = normal<T>(heads * p.L * p.E);
  const auto grad_out = normal<T>(heads * p.n_queries * p.E), float_mask = normal<T>(p.n_queries * p.L);
  auto view = [&](const T* data, int64_t width) {
    return Rows{const_cast<T*>(data), p.H * p.L * width, p.L * width, width};
  };
  p.query = view(query.data(), p.D), p.value = view(value.data(), p.E);
  if (!shared) p.key = view(key.data(), p.D);
  const int64_t n_sequences = between(1, 3);
  std::vector<int32_t> bounds;
  for (int64_t b = 0; b < (own_bounds ? p.B : 1); ++b) {
    bounds.push_back(0);
    for (int64_t s = 1; s < n_sequences; ++s) bounds.push_back(static_cast<int32_t>(between(bounds.back(), p.L)));
    bounds.push_back(static_cast<int32_t>(p.L));
  }
  p.cu_seqlens = packed ? bounds.data() : nullptr, p.bounds_stride = own_bounds ? n_sequences + 1 : 0;
  p.n_sequences = packed ? n_sequences : 1;
  const int n_buckets = static_cast<int>(pick({1, 2, 7, 500}));
  std::vector<int32_t> buckets(heads * p.R * p.L), order(buckets.size());
  for (auto& b : buckets) b = static_cast<int32_t>(generator() % n_buckets);
  if (shared) {
    const OrderParams o{heads,           p.H, p.R,         p.L, n_buckets, buckets.data(), p.cu_seqlens, p.n_sequences,
                        p.bounds_stride, p.L, order.data()};
    if (cpu::bucket_order(o, threads(2)) != 0) std::exit(1);
    p.order = order.data(), p.buckets = buckets.data();
  }
  const Flags padding(p.B * p.L, pick({0, 1, 1, 2}) / 2.0), mask(p.n_queries * p.L, 0.4);
  if (chance(0.3)) p.padding = padding.data.get();
  if (chance(0.2))
    p.bool_mask = mask.data.get();
  else if (chance(0.2))
    p.float_mask = float_mask.data();
  p.mask_stride_q = p.L, p.mask_stride_k = 1;

  const double tolerance = sizeof(T) == 4 ? 2e-4 : 1e-11;  // against wrong answers; the Python tests derive theirs
  const Results<T> expected = run(cpu::kernels_baseline()->*type, p, grad_out, 1);
  same(expected, run(cpu::kernels_baseline()->*type, p, grad_out, static_cast<int>(between(2, 7))), 0);
  same(expected, run(wide, p, grad_out, 2), tolerance);
  for (const char* isa : {"avx2", "avx512"})
    if (cpu::select(isa)) same(expected, run(cpu::kernels().*type, p, grad_out, 2), tolerance);
}

template <class T>
Results<T> run_lists(const cpu::TypedKernels<T>& kernels, AttentionParams p, const std::vector<T>& grad_out,
                     int n_threads) {
  const T poison = std::numeric_limits<T>::quiet_NaN();
  const int64_t rows = p.B * p.H * p.L, keys = p.B * p.key_heads * p.S;
  Results<T> r{std::vector<T>(rows * p.E, poison), std::vector<T>(rows, poison),
               std::vector<T>(rows * p.D, poison), std::vector<T>(keys * p.D, poison),
               std::vector<T>(keys * p.E, poison), nullptr};
  auto view = [](const T* data, int64_t H, int64_t L, int64_t width) {
    return Rows{const_cast<T*>(data), H * L * width, L * width, width};
  };
  p.out = view(r.out.data(), p.H, p.L, p.E), p.lse = r.lse.data();
  kernels.list_forward(p, threads(n_threads));
  p.grad_out = view(grad_out.data(), p.H, p.L, p.E);
  p.grad_query = view(r.grad_query.data(), p.H, p.L, p.D);
  p.grad_key = view(r.grad_key.data(), p.key_heads, p.S, p.D);
  p.grad_value = view(r.grad_value.data(), p.key_heads, p.S, p.E);
  kernels.list_backward(p, threads(n_threads));
  return r;
}

template <class T>
void list_case(const cpu::TypedKernels<T> cpu::Kernels::* type, const cpu::TypedKernels<T>& wide) {
  AttentionParams p{};
  p.B = between(1, 2), p.key_heads = between(1, 2), p.H = p.key_heads * between(1, 3);
  p.L = pick({1, 2, 16, 63, 64, 65, 130}), p.S = chance(0.5) ? p.L : pick({1, 5, 64, 100});
  if (chance(0.04)) p.L = pick({1, 17}), p.S = 16400;  // chosen in two steps
  p.D = pick({1, 3, 16, 17, 64}), p.E = chance(0.7) ? p.D : pick({1, 5, 33});
  p.R = between(1, 2), p.n_queries = p.L, p.n_sequences = 1;
  p.chunk_length = std::min(pick({1, 3, 16, 64, 100}), p.L), p.context_keys = chance(0.3) ? between(0, p.S) : 0;
  p.scale = 0.7;
  const int64_t budget = pick({1, 3, 16, 40, 130}), local = between(0, budget), heads = p.B * p.H;
  p.list_length = p.R == 1 ? p.context_keys + budget : std::max(p.context_keys + local, budget - local);
  p.list_length = std::max<int64_t>(p.list_length, 1);
  const auto query = normal<T>(heads * p.L * p.D), key = normal<T>(p.B * p.key_heads * p.S * p.D),
             value = normal<T>(p.B * p.key_heads * p.S * p.E), grad_out = normal<T>(heads * p.L * p.E),
             float_mask = normal<T>(p.L * p.S);
  auto view = [](const std::vector<T>& x, int64_t H, int64_t L, int64_t width) {
    return Rows{const_cast<T*>(x.data()), H * L * width, L * width, width};
  };
  p.query = view(query, p.H, p.L, p.D), p.key = view(key, p.key_heads, p.S, p.D);
  p.value = view(value, p.key_heads, p.S, p.E);
  std::vector<int32_t> order(heads * p.R * p.L);
  for (int64_t i = 0; i < heads * p.R; ++i) {
    std::iota(order.begin() + i * p.L, order.begin() + (i + 1) * p.L, 0);
    if (i % p.R == 1) std::shuffle(order.begin() + i * p.L, order.begin() + (i + 1) * p.L, generator);
  }
  p.order = order.data();
  const Flags padding(p.B * p.S, 0.4), mask(p.L * p.S, 0.4), padded_queries(p.B * p.L, pick({1, 2}) / 2.0);
  const bool* query_padding = chance(0.3) ? padded_queries.data.get() : nullptr;
  p.flags = chance(0.5) ? kCausal : 0;
  if (chance(0.3)) p.padding = padding.data.get();
  if (chance(0.2))
    p.bool_mask = mask.data.get();
  else if (chance(0.2))
    p.float_mask = float_mask.data();
  else
    p.flags |= chance(0.7) ? kRestKey : 0;
  p.mask_stride_q = p.S, p.mask_stride_k = 1;
  const int64_t chunks = (p.L + p.chunk_length - 1) / p.chunk_length;
  std::vector<LocalWindow> windows;
  for (int64_t i = 0; i < p.B * chunks; ++i) {
    const int64_t keys = p.S - p.context_keys, begin = between(0, keys),
                  end = std::min(keys, begin + between(0, local));
    windows.push_back({int32_t(begin), int32_t(end), int32_t(p.R == 1 ? budget : budget - local)});
  }
  auto select = [&](const cpu::TypedKernels<T>& kernels, int n_threads) {
    std::vector<int32_t> lists(heads * p.R * chunks * p.list_length, -7);
    kernels.select(SelectParams{p, budget, windows.data(), query_padding, lists.data()}, threads(n_threads));
    return lists;
  };
  const std::vector<int32_t> lists = select(cpu::kernels_baseline()->*type, 1);
  for (int32_t k : lists)
    if (k < -1 || k >= p.S) std::exit(1);
  if (select(cpu::kernels_baseline()->*type, static_cast<int>(between(2, 5))) != lists) {
    std::printf("the choice of keys depends on the threads\n");
    std::exit(1);
  }
  select(wide, 2);
  p.key_indices = lists.data();
  const int64_t seed = static_cast<int64_t>(generator());
  p.keep_factor = chance(0.3) ? 1.25 : 1.0, p.drop_threshold = 858993459u, p.dropout_seed = &seed;
  const double tolerance = sizeof(T) == 4 ? 2e-4 : 1e-11;
  const Results<T> expected = run_lists(cpu::kernels_baseline()->*type, p, grad_out, 1);
  same(expected, run_lists(cpu::kernels_baseline()->*type, p, grad_out, static_cast<int>(between(2, 7))), 0);
  same(expected, run_lists(wide, p, grad_out, 2), tolerance);
  for (const char* isa : {"avx2", "avx512"})
    if (cpu::select(isa)) {
      select(cpu::kernels().*type, 2);
      same(expected, run_lists(cpu::kernels().*type, p, grad_out, 2), tolerance);
    }
}

template <class T>
void hash_case(const cpu::TypedKernels<T> cpu::Kernels::* type, const cpu::TypedKernels<T>& wide) {
  HashParams p{};
  p.B = between(1, 2), p.H = between(1, 2), p.L = pick({1, 5, 64, 130}), p.D = pick({1, 3, 16, 33, 64}),
  p.R = between(1, 3);
  std::vector<int64_t> factors(between(1, 3));
  int64_t columns = 0, total = 1;
  for (auto& f : factors) f = pick({2, 4, 6, 14, 32}), columns += f / 2, total *= f;
  const auto x = normal<T>(p.B * p.H * p.L * p.D), rotations = normal<T>(p.D * p.R * columns);
  const Flags padding(p.B * p.L, 0.3);
  std::vector<int32_t> buckets(p.B * p.H * p.R * p.L, -1);
  p.x = {const_cast<T*>(x.data()), p.H * p.L * p.D, p.L * p.D, p.D}, p.rotations = rotations.data();
  p.n_factors = static_cast<int64_t>(factors.size()), p.factors = factors.data(), p.buckets = buckets.data();
  p.padding = chance(0.5) ? padding.data.get() : nullptr;
  for (const auto& k : {cpu::kernels_baseline()->*type, cpu::kernels().*type, wide}) {
    k.hash(p, threads(3));
    for (int32_t b : buckets)
      if (b < 0 || b > total) std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 300;
  generator.seed(argc > 2 ? std::atoi(argv[2]) : 1);
  for (int i = 0; i < cases; ++i) {
    attention_case<float>(&cpu::Kernels::f32, cpu::wide::kTyped<float>);
    attention_case<double>(&cpu::Kernels::f64, cpu::wide::kTyped<double>);
    list_case<float>(&cpu::Kernels::f32, cpu::wide::kTyped<float>);
    list_case<double>(&cpu::Kernels::f64, cpu::wide::kTyped<double>);
    hash_case<float>(&cpu::Kernels::f32, cpu::wide::kTyped<float>);
    hash_case<double>(&cpu::Kernels::f64, cpu::wide::kTyped<double>);
  }
  std::printf("%d cases passed, 0 failed\n", 4 * cases);
}
