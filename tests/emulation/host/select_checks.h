// Problems of the kernels that choose keys for the sanitizers: lists have so many keys as there are, which rise, and no
// padding. That these are the best is seen in Python.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "drivers.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.h"

namespace rk::host {

struct SelectProblem {
  int64_t L, S, D, C, R = 1, H = 2, key_heads = 1, budget = 20, local = 5, context = 0;
  bool causal = false, padded = false;
};

template <class T>
bool select_is_right(const SelectProblem& problem, Element element) {
  const auto& [L, S, D, C, R, H, key_heads, budget, local, context, causal, padded] = problem;
  std::minstd_rand random(L + D);
  std::uniform_real_distribution<float> uniform(-1.f, 1.f);
  std::vector<T> query(H * L * D), key(key_heads * S * D);
  for (T& x : query) x = cuda::from_float<T>(uniform(random));
  for (T& x : key) x = cuda::from_float<T>(uniform(random));
  std::vector<int32_t> order;  // positions, then any other order
  for (int64_t i = 0; i < H * R; ++i) {
    std::vector<int32_t> positions(L);
    std::iota(positions.begin(), positions.end(), 0);
    if (i % R) std::shuffle(positions.begin(), positions.end(), random);
    order.insert(order.end(), positions.begin(), positions.end());
  }
  const int64_t keys = S - context, chunks = (L + C - 1) / C, most = std::min(R == 1 ? budget : budget - local, keys);
  const int64_t width = R == 1 ? context + most : std::max(context + std::min(local, keys), most);
  const auto padding = std::make_unique<bool[]>(S), query_padding = std::make_unique<bool[]>(L);
  for (int64_t i = 0; padded && i < keys; ++i) padding[i] = random() % 3 == 0;
  for (int64_t i = 0; padded && !causal && i < L; ++i) query_padding[i] = random() % 2 == 0;
  std::vector<int32_t> lists(H * R * chunks * width, -9);
  std::vector<LocalWindow> windows;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t end = std::min({i * C + C, L, keys}), begin = std::max<int64_t>(0, end - local);
    windows.push_back({int32_t(begin), int32_t(end), int32_t(R == 1 ? budget : budget - local)});
  }

  SelectParams s{};
  AttentionParams& p = s.attention;
  p.element = element, p.B = 1, p.H = H, p.key_heads = key_heads, p.L = L, p.S = S, p.D = D, p.R = R;
  p.chunk_length = C, p.context_keys = context, p.list_length = width, p.scale = 0.3;
  p.flags = causal ? kCausal : 0;
  p.query = {query.data(), H * L * D, L * D, D}, p.key = {key.data(), key_heads * S * D, S * D, D};
  p.order = R > 1 ? order.data() : nullptr, p.padding = padded ? padding.get() : nullptr;
  s.budget = budget, s.windows = windows.data(), s.query_padding = padded ? query_padding.get() : nullptr;
  s.lists = lists.data();
  const cuda::SelectPlan plan = cuda::plan_select(s);
  settings().shared_limit = std::max(plan.of_blocks.shared_bytes, plan.of_keys.shared_bytes);
  const auto memory = scratch_memory(plan.bytes);
  if (cuda::select_keys(s, memory.get(), nullptr) != 0) return false;

  bool right = true;
  for (int64_t h = 0; h < H; ++h)
    for (int64_t i = 0; i < R * chunks; ++i) {
      const int32_t* list = lists.data() + (h * R * chunks + i) * width;
      const int64_t of_context = i < chunks ? context : 0, ends = std::min(i % chunks * C + C, L);
      for (int64_t j = 0; j < of_context; ++j) right = right && list[j] == keys + j;
      const int64_t count = std::find(list + of_context, list + width, -1) - list - of_context;
      const int32_t* chosen = list + of_context;
      right = right && std::all_of(chosen + count, list + width, [](int32_t x) { return x == -1; });
      for (int64_t j = 0; j < count; ++j)
        right = right && chosen[j] >= (j ? chosen[j - 1] + 1 : 0) && chosen[j] < keys && !padding[chosen[j]];
      const int64_t there = std::count(padding.get(), padding.get() + (causal ? ends : keys), false);
      right = right && count <= there && (R > 1 || count == std::min(budget, there));
    }
  return right;
}

template <class T>
void add_select(std::vector<Check>& checks, const std::string& name, Element element, const SelectProblem& problem) {
  checks.push_back({name + " " + std::to_string(problem.L) + "x" + std::to_string(problem.D),
                    [problem, element] { return select_is_right<T>(problem, element); }, true, true});
}

inline void add_select(std::vector<Check>& checks) {
  add_select<cuda::bf16>(checks, "select bfloat16", Element::kBFloat16, {.L = 32, .S = 70, .D = 20, .C = 16});
  if (kFew) return;
  const SelectProblem problems[] = {
      {.L = 70, .S = 70, .D = 72, .C = 16, .causal = true, .padded = true},
      {.L = 70, .S = 83, .D = 40, .C = 20, .R = 2, .key_heads = 2, .context = 3, .padded = true},
      {.L = 10, .S = cuda::kSelectExactKeys + 100, .D = 20, .C = 10, .H = 1, .padded = true},  // in two steps
  };
  for (const SelectProblem& problem : problems) {
    add_select<cuda::bf16>(checks, "select bfloat16", Element::kBFloat16, problem);
    add_select<float>(checks, "select float32", Element::kSame, problem);
  }
  add_select<cuda::fp16>(checks, "select float16", Element::kFloat16, {.L = 40, .S = 0, .D = 30, .C = 16});
}

}  // namespace rk::host
