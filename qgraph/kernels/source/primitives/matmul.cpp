// The product of dense arrays, with the meaning of mx.matmul.
#include <cstring>

#include "../module.h"
#include "../primitive.h"

namespace qgraph {
namespace {

// The operands as stacks of matrices: a vector on the left is a row, one on the right a column.
struct Shapes {
  mx::Shape a, b, batch, result;  // batch: the broadcast axes before the last two

  Shapes(const mx::Shape& left, const mx::Shape& right) : a(left), b(right) {
    if (left.empty() || right.empty()) throw std::invalid_argument("matmul: an operand has no axes");
    if (left.size() == 1) a.insert(a.begin(), 1);
    if (right.size() == 1) b.push_back(1);
    if (a.back() != b[b.size() - 2])
      throw std::invalid_argument("matmul: the last axis of the left operand has " + std::to_string(a.back()) +
                                  " elements, the axis it meets " + std::to_string(b[b.size() - 2]));
    batch = mx::broadcast_shapes(mx::Shape(a.begin(), a.end() - 2), mx::Shape(b.begin(), b.end() - 2));
    result = batch;
    if (left.size() > 1) result.push_back(a[a.size() - 2]);
    if (right.size() > 1) result.push_back(b.back());
  }
};

// Where the matrices of an operand start, for every problem of the batch, in elements.
std::vector<int64_t> starts(const mx::Shape& batch, const mx::array& x, int axes) {
  std::vector<int64_t> offsets = {0};
  int missing = static_cast<int>(batch.size()) - axes;
  for (int i = 0; i < static_cast<int>(batch.size()); i++) {
    int64_t step = i < missing || x.shape(i - missing) == 1 ? 0 : x.strides(i - missing);
    std::vector<int64_t> next;
    next.reserve(offsets.size() * batch[i]);
    for (int64_t offset : offsets)
      for (int j = 0; j < batch[i]; j++) next.push_back(offset + j * step);
    offsets = std::move(next);
  }
  return offsets;
}

mx::array multiply(const mx::array& a, const mx::array& b, mx::Stream s);

mx::array turned(const mx::array& x, mx::Stream s) { return mx::swapaxes(x, -1, -2, s); }

// `x` with the axes summed along which an operand of this shape was broadcast.
mx::array fold_batch(const mx::array& x, const mx::Shape& shape, mx::Stream s) {
  if (x.shape() == shape) return x;
  std::vector<int> axes;
  int extra = static_cast<int>(x.ndim() - shape.size());
  for (int i = 0; i + 2 < static_cast<int>(x.ndim()); i++)
    if (i < extra || shape[i - extra] != x.shape(i)) axes.push_back(i);
  return mx::reshape(mx::sum(x, axes, true, s), shape, s);
}

class MatmulPrimitive : public Native {
 public:
  MatmulPrimitive(mx::Stream s, mx::Dtype dtype) : Native(s, [dtype](const Arrays& in) -> Arrays {
    auto y = mx::matmul(mx::astype(in[0], mx::float32), mx::astype(in[1], mx::float32));
    return {mx::astype(y, dtype)};
  }) {}

  const char* name() const override { return "QgraphMatmul"; }
  bool is_equivalent(const mx::Primitive& o) const override { return dynamic_cast<const MatmulPrimitive*>(&o); }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    return {Shapes(in[0].shape(), in[1].shape()).result};
  }

  // Gradients are products again; those of vectors are the formula's.
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    auto &a = primals[0], &b = primals[1];
    if (a.ndim() < 2 || b.ndim() < 2) return Native::vjp(primals, cotangents, argnums, outputs);
    auto s = stream();
    auto flat = [&](const mx::array& x) { return mx::reshape(x, {-1, x.shape(-1)}, s); };
    Arrays gradients;
    for (int i : argnums) {
      auto& dy = cotangents[0];
      if (i == 0) gradients.push_back(fold_batch(multiply(dy, turned(b, s), s), a.shape(), s));
      else if (b.ndim() == 2 && dy.size()) gradients.push_back(multiply(turned(flat(a), s), flat(dy), s));
      else gradients.push_back(fold_batch(multiply(turned(a, s), dy, s), b.shape(), s));
    }
    return gradients;
  }

  // The mapped axis becomes the first of the batch.
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    size_t rank = 0;
    for (int i = 0; i < 2; i++) {
      size_t own = inputs[i].ndim() - (axes[i] >= 0);
      if (own < 2) return Native::vmap(inputs, axes);
      rank = std::max(rank, own);
    }
    Arrays moved;
    for (int i = 0; i < 2; i++) {
      auto& x = inputs[i];
      if (axes[i] < 0) {
        moved.push_back(x);
        continue;
      }
      auto front = mx::moveaxis(x, axes[i], 0, stream());
      mx::Shape shape = front.shape();
      shape.insert(shape.begin() + 1, rank + 1 - shape.size(), 1);
      moved.push_back(mx::reshape(front, shape, stream()));
    }
    return {{multiply(moved[0], moved[1], stream())}, {0}};
  }

 protected:
  void run(const Arrays& in, mx::array& out) override {
    allocate(out);
    if (out.size() == 0) return;
    Shapes shapes(in[0].shape(), in[1].shape());
    Matmul c{};
    c.k = shapes.a.back(), c.m = shapes.a[shapes.a.size() - 2], c.n = shapes.b.back();
    c.type = type_of(out.dtype());
    c.y = const_cast<void*>(static_cast<const void*>(out.data<void>()));
    c.y_stride = c.n;
    if (c.k == 0) return dispatch(in, out, [y = c.y, n = out.nbytes()] { std::memset(y, 0, n); });
    std::vector<int64_t> a_starts, b_starts;
    auto a = in[0], b = in[1];
    c.batch = 1;
    if (b.ndim() <= 2) {  // one matrix for all: the rows of all problems are rows of one
      Rows rows{};
      bool one_stride = rows_of(a, rows) && rows.sizes[1] == 1;
      if (!one_stride) a = row_major(a);
      c.m = out.size() / c.n;
      c.a_row = !one_stride ? c.k : rows.strides[0];
    } else {
      a_starts = starts(shapes.batch, a, static_cast<int>(shapes.a.size()) - 2);
      b_starts = starts(shapes.batch, b, static_cast<int>(shapes.b.size()) - 2);
      c.batch = static_cast<int64_t>(a_starts.size());
      c.a_row = a.ndim() == 1 ? 0 : a.strides(-2);
    }
    c.a_column = a.strides(-1);
    c.b_row = b.ndim() == 1 ? b.strides(0) : b.strides(-2);
    c.b_column = b.ndim() == 1 ? 1 : b.strides(-1);
    c.a = a.data<void>(), c.b = b.data<void>();
    dispatch(in, out, [c, a_starts = std::move(a_starts), b_starts = std::move(b_starts)]() mutable {
      if (c.batch > 1) c.a_offsets = a_starts.data(), c.b_offsets = b_starts.data();
      kernels().matmul(c);
    });
  }
};

mx::array multiply(const mx::array& a, const mx::array& b, mx::Stream s) {
  auto dtype = mx::promote_types(a.dtype(), b.dtype());
  type_of(dtype);
  auto as = [&](const mx::array& x) { return x.dtype() == dtype ? x : mx::astype(x, dtype, s); };
  auto shape = Shapes(a.shape(), b.shape()).result;
  return mx::array(shape, dtype, std::make_shared<MatmulPrimitive>(s, dtype), Arrays{as(a), as(b)});
}

}  // namespace

void bind_matmul(nb::module_& m) {
  m.def("matmul", [](const mx::array& a, const mx::array& b) { return multiply(a, b, current_stream()); },
        nb::arg("a"), nb::arg("b"));
}

}  // namespace qgraph
