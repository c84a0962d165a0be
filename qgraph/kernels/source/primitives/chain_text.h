// Chains of element-wise operations as text, and what is made of it: instructions, a formula of MLX's ops.
#pragma once
#include <string_view>

#include "../chain.h"
#include "../primitive.h"

namespace qgraph {

// What an operation of the text is called, what computes it, and the same as an MLX op.
struct Known {
  std::string_view name;
  Operation operation;
  int arity;
  mx::array (*formula)(const Arrays&);
  double nanoseconds;  // an element, about
  bool chooses;        // the result is one of the operands, or a number that every dtype has
};

// Step i of a chain of n operands has the number n + i; its operands are numbers below.
struct Step {
  const Known* known;  // null for a constant
  std::vector<int> operands;
  float value;
  mx::Dtype dtype;
};

// "sigmoid(0):bf16 multiply(0,2):bf16 constant(0.5):bf16 add(3,4):bf16" on two operands. Throws
// std::invalid_argument for what is no such text.
std::vector<Step> parse_chain(const std::string& text, int operands);

// The instructions of a chain on operands of these dtypes, and where its numbers are.
struct Compiled {
  std::vector<uint8_t> operands;  // their registers
  std::vector<Constant> constants;
  std::vector<Instruction> instructions;
  int registers = 0;
  uint8_t result = 0;
  double nanoseconds = 0;
};
Compiled compile_chain(const std::vector<Step>& steps, const std::vector<mx::Dtype>& dtypes);

Arrays chain_formula(const std::vector<Step>& steps, const Arrays& operands);

Element element_of(mx::Dtype dtype);

}  // namespace qgraph
