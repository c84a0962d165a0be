// A packed weight as MLX arrays: checked once when a primitive is made, read when it runs.
#pragma once
#include "../primitive.h"

namespace qgraph {

struct Scheme {
  Mode mode;
  std::string name;
  int bits, group;

  bool operator==(const Scheme& o) const { return mode == o.mode && bits == o.bits && group == o.group; }
};

Scheme scheme(const std::string& mode, int bits, int group_size);

// The components in the order in which they are inputs of a primitive: words, scales, biases (affine), global
// scale (where there is one). Throws std::invalid_argument where they do not fit each other.
Arrays components(
    const Scheme& scheme,
    const mx::array& w,
    const mx::array& scales,
    const std::optional<mx::array>& biases,
    const std::optional<mx::array>& global_scale);

// The logical shape (..., rows, columns) of packed words.
mx::Shape logical_shape(const Scheme& scheme, const mx::array& w);

// A matrix of a stack for the kernels, made of row-major components; `index` counts the stack's matrices.
struct Stack {
  Packed first;
  const float* global;  // read when the kernel runs: it may not be computed before

  Stack(const Scheme& scheme, const Arrays& components, bool has_global);
  Packed at(int64_t index) const;
};

// What MLX makes of the same components: dequantized in f32 for the formulas.
mx::array dequantized(const Scheme& scheme, const Arrays& components, bool has_global);

// The offsets of `shape` broadcast to `to`, in units of `unit`: one for every element of `to`, in order.
std::vector<int64_t> offsets(const mx::Shape& shape, const mx::Shape& to, int64_t unit);

// The elements of an integer array; to be called when it has been computed.
std::vector<int64_t> integers(const void* data, mx::Dtype dtype, int64_t size);

}  // namespace qgraph
