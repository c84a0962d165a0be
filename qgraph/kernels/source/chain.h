// A chain of element-wise operations as a program: instructions on registers, each of which holds a block of
// numbers as floats. What the primitive makes and elementwise.h interprets.
#pragma once
#include <cstdint>

namespace qgraph {

enum class Element : uint8_t { f32, bf16, f16, boolean, i32 };

inline int size_of(Element e) {
  return e == Element::f32 || e == Element::i32 ? 4 : e == Element::boolean ? 1 : 2;
}

enum class Operation : uint8_t {
  copy, negative, abs, square, cube, reciprocal, sqrt, rsqrt, floor, ceil, round, relu,
  exp, expm1, log, log1p, sin, cos, tanh, sigmoid, erf, logical_not,
  add, subtract, multiply, divide, maximum, minimum, power, logaddexp,
  equal, not_equal, less, less_equal, greater, greater_equal, logical_and, logical_or,
  where,
};

// to = operation(a, b, c), rounded to the numbers of `rounding`: no rounding for f32, and where it is exact.
struct Instruction {
  Operation operation;
  Element rounding;
  uint8_t to, a, b, c;
};

struct Axis {
  int64_t size, stride;  // in elements; stride 0: the one element stands for all
};

// An array whose elements, counted through its axes, are those of the result in row-major order.
struct Operand {
  static constexpr int AXES = 8;
  const void* data;
  Element type;
  uint8_t to;  // the register that it is loaded into
  int axes;
  Axis layout[AXES];
};

struct Constant {
  float value;
  uint8_t to;
};

struct Elementwise {
  const Operand* operands;
  const Constant* constants;
  const Instruction* instructions;
  int operand_count, constant_count, instruction_count, registers;
  uint8_t result;  // the register that is stored
  void* y;         // contiguous
  Element y_type;
  int64_t count;
  double nanoseconds;  // of work an element, about
};

}  // namespace qgraph
