// Which elements of the matrices of an mma lie in which register of which lane.
#pragma once
#include "numbers.h"

namespace emulation {

struct Tf32 {};  // the upper 19 bits of a float

template <class T>
constexpr int kElementBytes = 2;
template <>
inline constexpr int kElementBytes<Tf32> = 4;

// Element `part` of a register of a matrix operand.
template <class T>
float operand_element(uint32_t bits, int part) {
  return to_float(T{static_cast<uint16_t>(bits >> (16 * part))});
}
template <>
inline float operand_element<Tf32>(uint32_t bits, int) {
  return truncate_to_tf32(bits);
}

struct Position {
  int row, column;
};

// Of a, 16 rows: registers alternate between the upper and the lower 8 rows.
template <class T>
Position position_a(int lane, int i, int part) {
  constexpr int kPerRegister = 4 / kElementBytes<T>;
  return {lane / 4 + i % 2 * 8, i / 2 * 4 * kPerRegister + lane % 4 * kPerRegister + part};
}

// Of b, 8 columns.
template <class T>
Position position_b(int lane, int i, int part) {
  constexpr int kPerRegister = 4 / kElementBytes<T>;
  return {i * 4 * kPerRegister + lane % 4 * kPerRegister + part, lane / 4};
}

// Of c and d, in float32: 16 rows, 8 columns for each 4 registers.
inline Position position_d(int lane, int i) { return {lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2}; }

}  // namespace emulation
