// The rest key: one key that stands for all keys that a query may see but did not. It is the mean of all keys that the
// query may see, and its value is the mean of their values. The logarithm of the number of unseen keys is added to its
// score. It is for separate queries and keys without attn_mask.
//
// If causal, the means are running means. Their sums are made block by block, so that workers can share them.
#pragma once
#include "kernels/cpu/work.h"

namespace rk::cpu::RK_ISA {

constexpr int64_t kRestBlock = 1024;

inline int64_t rest_keys(const AttentionParams& p) { return p.S - p.context_keys; }
inline int64_t rest_blocks(const AttentionParams& p) {
  return (std::max(rest_keys(p), p.L) + kRestBlock - 1) / kRestBlock;
}

template <class T>
class RestKey {
 public:
  RestKey(const AttentionParams& p, SequenceState<T>& state)
      : p_(p),
        seq_(state.sequence),
        state_(state),
        s_(state.lists),
        padding_(p.padding ? p.padding + seq_.b * p.S : nullptr),
        Dp_(round_up(p.D, kRowPad)),
        Ep_(round_up(p.E, kRowPad)),
        keys_(rest_keys(p)),
        blocks_(rest_blocks(p)) {}

  // Merges the rest key into out and lse of every query.
  template <class P>
  void forward(P&& parallel) {
    sum_keys(parallel);
    T* lse = static_cast<T*>(p_.lse) + (seq_.b * p_.H + seq_.h) * p_.L;
    each_query(parallel, [&](int64_t i, const T* key_sum, const T* value_sum, T count) {
      const T unseen = count - s_.seen[i];
      if (!(unseen > 0)) return;
      const T score = score_of(i, key_sum, count, unseen);
      const T top = std::max(score, lse[i]), total = top + std::log(std::exp(score - top) + std::exp(lse[i] - top));
      add_row<T>(p_.out.at<T>(seq_.b, seq_.h, i), value_sum, p_.E, std::exp(score - total) / count,
                 std::exp(lse[i] - total));
      lse[i] = total;
    });
  }

  // Adds its gradients. row_a and row_b are as backward_rows left them.
  template <class P>
  void backward(P&& parallel) {
    sum_keys(parallel);
    s_.key_weight.grow(p_.L), s_.value_weight.grow(p_.L);
    s_.query_sums.grow((blocks_ + 1) * Dp_), s_.out_sums.grow((blocks_ + 1) * Ep_);
    std::fill_n<T*>(s_.query_sums, (blocks_ + 1) * Dp_, T(0));
    std::fill_n<T*>(s_.out_sums, (blocks_ + 1) * Ep_, T(0));
    each_query(parallel, [&](int64_t i, const T* key_sum, const T* value_sum, T count) {
      T *a = s_.key_weight + i, *b = s_.value_weight + i;
      const T unseen = count - s_.seen[i];
      *a = *b = 0;
      if (!(unseen > 0)) return;
      const T* g = grad_out(i);
      const T weight = std::exp2(score_of(i, key_sum, count, unseen) * static_cast<T>(kLog2e) - state_.row_a[i]);
      const T slope = weight * (dot<T>(g, value_sum, p_.E) / count - state_.row_b[i]) * static_cast<T>(p_.scale);
      *a = slope / count, *b = weight / count;
      add_row<T>(p_.grad_query.at<T>(seq_.b, seq_.h, i), key_sum, p_.D, *a);
      add_row<T>(s_.query_sums + i / kRestBlock * Dp_, query(i), p_.D, *a);
      add_row<T>(s_.out_sums + i / kRestBlock * Ep_, g, p_.E, *b);
    });
    for (int64_t k = blocks_ - 1; k-- > 0;) {  // sums of a block and all blocks after it
      add_row<T>(s_.query_sums + k * Dp_, s_.query_sums + (k + 1) * Dp_, p_.D);
      add_row<T>(s_.out_sums + k * Ep_, s_.out_sums + (k + 1) * Ep_, p_.E);
    }
    parallel(0, blocks_, [&](auto&, int64_t begin, int64_t end) {
      std::vector<T> sums(Dp_ + Ep_);
      T *q = sums.data(), *g = q + Dp_;
      for (int64_t k = begin; k < end; ++k) {
        const bool causal = p_.has(kCausal);  // then the sums are over queries from the key's position on
        std::copy_n(s_.query_sums + (causal ? k + 1 : 0) * Dp_, Dp_, q);
        std::copy_n(s_.out_sums + (causal ? k + 1 : 0) * Ep_, Ep_, g);
        for (int64_t i = std::min((k + 1) * kRestBlock, std::max(keys_, p_.L)); i-- > k * kRestBlock;) {
          if (causal && i < p_.L) {
            add_row<T>(q, query(i), p_.D, s_.key_weight[i]);
            add_row<T>(g, grad_out(i), p_.E, s_.value_weight[i]);
          }
          if (!counts(i)) continue;
          add_row<T>(p_.grad_key.at<T>(seq_.b, seq_.key_head, i), q, p_.D);
          add_row<T>(p_.grad_value.at<T>(seq_.b, seq_.key_head, i), g, p_.E);
        }
      }
    });
  }

 private:
  const T* query(int64_t i) const { return p_.query.at<T>(seq_.b, seq_.h, i); }
  const T* grad_out(int64_t i) const { return p_.grad_out.at<T>(seq_.b, seq_.h, i); }
  bool counts(int64_t i) const { return i < keys_ && !(padding_ && padding_[i]); }

  T score_of(int64_t i, const T* key_sum, T count, T unseen) const {
    return static_cast<T>(p_.scale) * dot<T>(query(i), key_sum, p_.D) / count + std::log(unseen);
  }

  void add_key(int64_t i, T* key_sum, T* value_sum, T& count) const {
    if (!counts(i)) return;
    add_row<T>(key_sum, p_.key.at<T>(seq_.b, seq_.key_head, i), p_.D);
    add_row<T>(value_sum, p_.value.at<T>(seq_.b, seq_.key_head, i), p_.E);
    count += 1;
  }

  // Sums of the keys before each block, and of all keys.
  template <class P>
  void sum_keys(P&& parallel) {
    s_.key_sums.grow((blocks_ + 1) * Dp_), s_.value_sums.grow((blocks_ + 1) * Ep_), s_.counts.grow(blocks_ + 1);
    std::fill_n<T*>(s_.key_sums, (blocks_ + 1) * Dp_, T(0));
    std::fill_n<T*>(s_.value_sums, (blocks_ + 1) * Ep_, T(0));
    std::fill_n<T*>(s_.counts, blocks_ + 1, T(0));
    parallel(0, blocks_, [&](auto&, int64_t begin, int64_t end) {
      for (int64_t i = begin * kRestBlock; i < end * kRestBlock; ++i) {
        const int64_t k = i / kRestBlock + 1;
        add_key(i, s_.key_sums + k * Dp_, s_.value_sums + k * Ep_, s_.counts[k]);
      }
    });
    for (int64_t k = 1; k <= blocks_; ++k) {
      add_row<T>(s_.key_sums + k * Dp_, s_.key_sums + (k - 1) * Dp_, p_.D);
      add_row<T>(s_.value_sums + k * Ep_, s_.value_sums + (k - 1) * Ep_, p_.E);
      s_.counts[k] += s_.counts[k - 1];
    }
  }

  // Calls f(query, sum of keys, sum of values, number of keys) for every query, of the keys that it may see.
  template <class P, class F>
  void each_query(P&& parallel, F&& f) {
    parallel(0, blocks_, [&](auto&, int64_t begin, int64_t end) {
      std::vector<T> sums(Dp_ + Ep_);
      T *key_sum = sums.data(), *value_sum = key_sum + Dp_;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t from = p_.has(kCausal) ? k : blocks_;
        std::copy_n(s_.key_sums + from * Dp_, Dp_, key_sum);
        std::copy_n(s_.value_sums + from * Ep_, Ep_, value_sum);
        T count = s_.counts[from];
        for (int64_t i = k * kRestBlock; i < std::min((k + 1) * kRestBlock, p_.L); ++i) {
          if (p_.has(kCausal)) add_key(i, key_sum, value_sum, count);
          f(i, key_sum, value_sum, count);
        }
      }
    });
  }

  const AttentionParams& p_;
  const HeadSequence& seq_;
  SequenceState<T>& state_;
  ListState<T>& s_;
  const bool* padding_;
  int64_t Dp_, Ep_, keys_, blocks_;
};

}  // namespace rk::cpu::RK_ISA
