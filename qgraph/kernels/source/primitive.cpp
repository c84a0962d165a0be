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

template <class T>
void copy_strided(const T* from, const mx::Strides& from_strides, T* to, const mx::Strides& to_strides,
                   const mx::Shape& shape) {
  const int last = static_cast<int>(shape.size()) - 1;
  if (last < 0) return void(*to = *from);
  int64_t row = shape[last], step = from_strides[last], to_step = to_strides[last], rows = 1;
  for (int i = 0; i < last; i++) rows *= shape[i];
  std::vector<int64_t> position(shape.size(), 0);
  for (int64_t r = 0; r < rows; r++) {
    if (step == 1 && to_step == 1) std::memcpy(to, from, row * sizeof(T));
    else for (int64_t j = 0; j < row; j++) to[j * to_step] = from[j * step];
    for (int i = last - 1; i >= 0; i--) {
      from += from_strides[i], to += to_strides[i];
      if (++position[i] < shape[i]) break;
      from -= from_strides[i] * shape[i], to -= to_strides[i] * shape[i];
      position[i] = 0;
    }
  }
}

}  // namespace

void copy_elements(const void* from, const mx::Strides& from_strides, void* to, const mx::Strides& to_strides,
                   const mx::Shape& shape, size_t size) {
  auto as = [&](auto type) {
    using T = decltype(type);
    copy_strided(static_cast<const T*>(from), from_strides, static_cast<T*>(to), to_strides, shape);
  };
  switch (size) {
    case 1: return as(uint8_t());
    case 2: return as(uint16_t());
    case 4: return as(uint32_t());
    default: return as(uint64_t());
  }
}

thread_local Recording* recording = nullptr;

mx::array row_major(const mx::array& a, mx::Stream stream) {
  if (a.flags().row_contiguous) return a;
  mx::array copy(a.shape(), a.dtype(), nullptr, {});
  allocate(copy);
  if (recording) recording->buffers.push_back(copy.data_shared_ptr());
  else mx::cpu::get_command_encoder(stream).add_temporary(copy);
  send(stream, [from = a.data<char>(), to = copy.data<char>(), shape = a.shape(), strides = a.strides(),
                dense = copy.strides(), size = a.itemsize()] {
    copy_elements(from, strides, const_cast<char*>(to), dense, shape, size);
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
