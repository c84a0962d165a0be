#include "primitive.h"

#include <cstring>

namespace qgraph {

namespace {

// The formula of the inputs `argnums` alone: the others may have no gradient in MLX (packed words).
Formula of_some(const Formula& formula, const Arrays& inputs, const std::vector<int>& argnums) {
  return [=](const Arrays& given) {
    Arrays all = inputs;
    for (size_t i = 0; i < argnums.size(); i++) all[argnums[i]] = given[i];
    return formula(all);
  };
}

Arrays some(const Arrays& inputs, const std::vector<int>& argnums) {
  Arrays chosen;
  for (int i : argnums) chosen.push_back(inputs[i]);
  return chosen;
}

}  // namespace

Arrays Native::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) {
  return mx::vjp(of_some(formula_, primals, argnums), some(primals, argnums), cotangents).second;
}

Arrays Native::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  return mx::jvp(of_some(formula_, primals, argnums), some(primals, argnums), tangents).second;
}

std::pair<Arrays, std::vector<int>> Native::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  return {mx::vmap(formula_, axes, {0})(inputs), {0}};
}

namespace {

// The elements of a strided array in row-major order; whole rows at once where the last axis is contiguous.
template <class T>
void gather(const T* from, T* to, const mx::Shape& shape, const mx::Strides& strides) {
  int last = static_cast<int>(shape.size()) - 1;
  int64_t row = shape[last], step = strides[last], rows = 1;
  for (int i = 0; i < last; i++) rows *= shape[i];
  std::vector<int64_t> position(shape.size(), 0);
  for (int64_t r = 0; r < rows; r++, to += row) {
    if (step == 1) std::memcpy(to, from, row * sizeof(T));
    else for (int64_t j = 0; j < row; j++) to[j] = from[j * step];
    for (int i = last - 1; i >= 0; i--) {
      from += strides[i];
      if (++position[i] < shape[i]) break;
      from -= strides[i] * shape[i];
      position[i] = 0;
    }
  }
}

}  // namespace

mx::array Native::row_major(const mx::array& a) {
  if (a.flags().row_contiguous) return a;
  mx::array copy(a.shape(), a.dtype(), nullptr, {});
  allocate(copy);
  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.add_temporary(copy);
  encoder.dispatch([from = a.data<char>(), to = copy.data<char>(), shape = a.shape(), strides = a.strides(),
                    size = a.itemsize()]() {
    auto* p = const_cast<char*>(from);
    auto* q = const_cast<char*>(to);
    switch (size) {
      case 1: return gather(reinterpret_cast<uint8_t*>(p), reinterpret_cast<uint8_t*>(q), shape, strides);
      case 2: return gather(reinterpret_cast<uint16_t*>(p), reinterpret_cast<uint16_t*>(q), shape, strides);
      case 4: return gather(reinterpret_cast<uint32_t*>(p), reinterpret_cast<uint32_t*>(q), shape, strides);
      default: return gather(reinterpret_cast<uint64_t*>(p), reinterpret_cast<uint64_t*>(q), shape, strides);
    }
  });
  return copy;
}

mx::Stream current_stream() { return mx::default_stream(mx::default_device()); }

Type type_of(mx::Dtype dtype) {
  if (dtype == mx::float32) return Type::f32;
  if (dtype == mx::bfloat16) return Type::bf16;
  if (dtype == mx::float16) return Type::f16;
  throw std::invalid_argument("a dtype without a native kernel");
}

mx::Dtype dtype_of(Type type) {
  return type == Type::f32 ? mx::float32 : type == Type::bf16 ? mx::bfloat16 : mx::float16;
}

bool rows_of(const mx::array& a, Rows& rows) {
  int n = 0;
  for (int i = 0; i + 1 < static_cast<int>(a.ndim()); i++) {
    int64_t size = a.shape(i), stride = a.strides(i);
    if (size == 1) continue;
    if (n && rows.strides[n - 1] == size * stride) {  // follows on from the axis before
      rows.sizes[n - 1] *= size;
      rows.strides[n - 1] = stride;
    } else {
      if (n == 4) return false;
      rows.sizes[n] = size;
      rows.strides[n++] = stride;
    }
  }
  for (int i = n; i < 4; i++) rows.sizes[i] = 1, rows.strides[i] = 0;
  rows.columns = a.shape(-1);
  return true;
}

}  // namespace qgraph
