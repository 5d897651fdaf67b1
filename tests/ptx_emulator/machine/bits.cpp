// Logic, shifts, bit fields and permutations.
#include <algorithm>

#include "registry.h"

namespace emulation {
namespace {

template <class T>
constexpr uint32_t kBits = 8 * sizeof(T);

template <class T>
void add_logic(Registry& r, const std::string& type) {
  r.add("and." + type, binary<T, T, [](T a, T b) { return static_cast<T>(a & b); }>);
  r.add("or." + type, binary<T, T, [](T a, T b) { return static_cast<T>(a | b); }>);
  r.add("xor." + type, binary<T, T, [](T a, T b) { return static_cast<T>(a ^ b); }>);
  r.add("not." + type, unary<T, T, [](T a) { return static_cast<T>(~a); }>);
}

// Amounts beyond the width shift everything out; a signed right shift leaves the sign.
template <class T, bool Left>
void shift(Context& c) {
  const auto d = c.destination<T>(0);
  const auto a = c.source<T>(0);
  const auto amount = c.source<uint32_t>(1);
  each_lane(c.lanes, [&](int lane) {
    const uint32_t n = amount[lane];
    if (Left) {
      d.set(lane, n >= kBits<T> ? T{0} : static_cast<T>(static_cast<uint64_t>(a[lane]) << n));
    } else if (std::is_signed_v<T>) {
      d.set(lane, static_cast<T>(a[lane] >> std::min(n, kBits<T> - 1)));
    } else {
      d.set(lane, n >= kBits<T> ? T{0} : static_cast<T>(a[lane] >> n));
    }
  });
}

// The 64 bits (b, a) shifted by c, of which the upper half (left) or the lower one (right) remains.
template <bool Left, bool Clamp>
uint32_t funnel_shift(uint32_t a, uint32_t b, uint32_t c) {
  const uint32_t n = Clamp ? std::min(c, 32u) : c & 31;
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  return static_cast<uint32_t>(Left ? both << n >> 32 : both >> n);
}

// Bits [start, start + count) of a; past the top they repeat the sign, or are zero.
template <class T>
void extract_field(Context& c) {
  const auto d = c.destination<T>(0);
  const auto a = c.source<T>(0);
  const auto start = c.source<uint32_t>(1), count = c.source<uint32_t>(2);
  each_lane(c.lanes, [&](int lane) {
    const uint32_t first = start[lane] & 255, n = count[lane] & 255;
    const uint64_t bits = static_cast<uint64_t>(a[lane]);  // sign-extended if T is signed
    const uint32_t last = std::min(first + n - 1, kBits<T> - 1);
    const bool sign = std::is_signed_v<T> && n != 0 && (bits >> last & 1) != 0;
    uint64_t field = 0;
    for (uint32_t i = 0; i < kBits<T>; ++i) {
      const bool inside = i < n && first + i < kBits<T>;
      const bool bit = inside ? (bits >> (first + i) & 1) != 0 : sign;
      field |= static_cast<uint64_t>(bit) << i;
    }
    d.set(lane, static_cast<T>(field));
  });
}

// b with its bits [start, start + count) replaced by the lowest of a.
template <class T>
void insert_field(Context& c) {
  const auto d = c.destination<T>(0);
  const auto a = c.source<T>(0), b = c.source<T>(1);
  const auto start = c.source<uint32_t>(2), count = c.source<uint32_t>(3);
  each_lane(c.lanes, [&](int lane) {
    const uint32_t first = start[lane] & 255, n = count[lane] & 255;
    T result = b[lane];
    for (uint32_t i = 0; i < n && first + i < kBits<T>; ++i) {
      const T bit = T{1} << (first + i);
      result = static_cast<T>((a[lane] >> i & 1) != 0 ? result | bit : result & ~bit);
    }
    d.set(lane, result);
  });
}

// Each nibble of the selector picks one of the 8 bytes (b, a); its top bit replicates the byte's sign instead.
uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> (4 * i) & 15;
    uint32_t byte = bytes >> (8 * (choice & 7)) & 255;
    if ((choice & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// Bit 4 a + 2 b + c of the table is the result for those three bits.
void logic_of_three(Context& c) {
  const auto d = c.destination<uint32_t>(0);
  const auto x = c.source<uint32_t>(0), y = c.source<uint32_t>(1), z = c.source<uint32_t>(2);
  const uint32_t table = static_cast<uint32_t>(c.immediate(0));
  each_lane(c.lanes, [&](int lane) {
    uint32_t result = 0;
    for (int row = 0; row < 8; ++row) {
      if ((table >> row & 1) == 0) continue;
      result |= ((row & 4) ? x[lane] : ~x[lane]) & ((row & 2) ? y[lane] : ~y[lane]) & ((row & 1) ? z[lane] : ~z[lane]);
    }
    d.set(lane, result);
  });
}

uint32_t reverse(uint32_t a) {
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
  return result;
}

// `count` ones from bit `start` on.
template <bool Clamp>
uint32_t mask(uint32_t start, uint32_t count) {
  if (!Clamp) {
    start &= 31;
    count &= 31;
  }
  if (start >= 32) return 0;
  const uint64_t ones = count >= 32 ? 0xffffffffull : (1ull << count) - 1;
  return static_cast<uint32_t>(ones << start);
}

// The position of the highest bit that differs from the sign, or -1.
uint32_t find_highest(uint32_t a) { return a == 0 ? 0xffffffffu : 31 - std::countl_zero(a); }

}  // namespace

void add_bits(Registry& r) {
  add_logic<uint16_t>(r, "b16");
  add_logic<uint32_t>(r, "b32");
  add_logic<uint64_t>(r, "b64");
  r.add("and.pred", binary<uint32_t, uint32_t, [](uint32_t a, uint32_t b) { return a & b; }>);
  r.add("or.pred", binary<uint32_t, uint32_t, [](uint32_t a, uint32_t b) { return a | b; }>);
  r.add("xor.pred", binary<uint32_t, uint32_t, [](uint32_t a, uint32_t b) { return a ^ b; }>);
  r.add("not.pred", unary<uint32_t, uint32_t, [](uint32_t a) { return a ^ 1; }>);
  r.add("shl.b16", shift<uint16_t, true>);
  r.add("shl.b32", shift<uint32_t, true>);
  r.add("shl.b64", shift<uint64_t, true>);
  r.add("shr.u16", shift<uint16_t, false>);
  r.add("shr.u32", shift<uint32_t, false>);
  r.add("shr.u64", shift<uint64_t, false>);
  r.add("shr.s16", shift<int16_t, false>);
  r.add("shr.s32", shift<int32_t, false>);
  r.add("shr.s64", shift<int64_t, false>);
  r.add("shf.l.wrap.b32", ternary<uint32_t, uint32_t, funnel_shift<true, false>>);
  r.add("shf.l.clamp.b32", ternary<uint32_t, uint32_t, funnel_shift<true, true>>);
  r.add("shf.r.wrap.b32", ternary<uint32_t, uint32_t, funnel_shift<false, false>>);
  r.add("shf.r.clamp.b32", ternary<uint32_t, uint32_t, funnel_shift<false, true>>);
  r.add("bfe.u32", extract_field<uint32_t>);
  r.add("bfe.s32", extract_field<int32_t>);
  r.add("bfe.u64", extract_field<uint64_t>);
  r.add("bfe.s64", extract_field<int64_t>);
  r.add("bfi.b32", insert_field<uint32_t>);
  r.add("bfi.b64", insert_field<uint64_t>);
  r.add("popc.b32", unary<uint32_t, uint32_t, [](uint32_t a) -> uint32_t { return std::popcount(a); }>);
  r.add("popc.b64", unary<uint32_t, uint64_t, [](uint64_t a) -> uint32_t { return std::popcount(a); }>);
  r.add("clz.b32", unary<uint32_t, uint32_t, [](uint32_t a) -> uint32_t { return std::countl_zero(a); }>);
  r.add("clz.b64", unary<uint32_t, uint64_t, [](uint64_t a) -> uint32_t { return std::countl_zero(a); }>);
  r.add("brev.b32", unary<uint32_t, uint32_t, reverse>);
  r.add("bfind.u32", unary<uint32_t, uint32_t, find_highest>);
  r.add("bfind.s32", unary<uint32_t, int32_t, [](int32_t a) { return find_highest(a < 0 ? ~a : a); }>);
  r.add("prmt.b32", ternary<uint32_t, uint32_t, permute>);
  r.add("lop3.b32", logic_of_three);
  r.add("bmsk.clamp.b32", binary<uint32_t, uint32_t, mask<true>>);
  r.add("bmsk.wrap.b32", binary<uint32_t, uint32_t, mask<false>>);
}

}  // namespace emulation
