// Products with packed weights, plain and of chosen matrices of a stack, and packed rows as numbers.
#include <algorithm>
#include <limits>
#include <numeric>

#include "../module.h"
#include "../pages.h"
#include "packed.h"

namespace qgraph {
namespace {

using Optional = std::optional<mx::array>;

struct How {
  Scheme scheme;
  bool transpose, int8, global;

  bool operator==(const How& o) const {
    return scheme == o.scheme && transpose == o.transpose && int8 == o.int8 && global == o.global;
  }
  int inputs() const { return (scheme.mode == Mode::affine ? 3 : 2) + global; }  // that store the weight
  std::pair<int, int> inner_outer(const mx::Shape& w) const {
    int rows = w[w.size() - 2], columns = w.back();
    return transpose ? std::pair(columns, rows) : std::pair(rows, columns);
  }
};

mx::Dtype result_dtype(const How& how, const mx::array& x, const mx::array& scales) {
  return how.scheme.mode == Mode::affine ? mx::promote_types(x.dtype(), scales.dtype()) : x.dtype();
}

void check_product(const How& how, const mx::array& x, const mx::array& w) {
  type_of(x.dtype());
  auto shape = logical_shape(how.scheme, w);
  int k = how.inner_outer(shape).first;
  if (x.ndim() == 0 || x.shape(-1) != k)
    throw std::invalid_argument(
        "quantized product: x has " + std::to_string(x.ndim() ? x.shape(-1) : 0) + " columns, the weight contracts " +
        std::to_string(k));
}

// The product by the dequantized weight in f32: `select` chooses matrices where the product gathers them.
Formula product_formula(How how, mx::Dtype dtype, std::function<mx::array(const Arrays&, mx::array, mx::array)> multiply) {
  return [=](const Arrays& in) -> Arrays {
    Arrays parts(in.begin() + 1, in.begin() + 1 + how.inputs());
    auto w = dequantized(how.scheme, parts, how.global);
    if (how.transpose) w = mx::swapaxes(w, -1, -2);
    return {mx::astype(multiply(in, mx::astype(in[0], mx::float32), w), dtype)};
  };
}

// Packed words have no gradient, nor have the bytes that scale the microscaled modes: an error, as in MLX.
void check_gradients(const How& how, int words, const std::vector<int>& argnums) {
  for (int i : argnums) {
    if (i == words) throw std::invalid_argument("no gradient wrt the quantized weights");
    if (i == words + 1 && how.scheme.mode != Mode::affine)
      throw std::invalid_argument("no gradient wrt scales in " + how.scheme.name + " quantization");
  }
}

// What both products share when they run: the weight's matrices and how rows of x and y lie.
class Product : public Native {
 public:
  Product(mx::Stream s, How how, Formula formula) : Native(s, std::move(formula)), how_(how) {}

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) override {
    check_gradients(how_, 1, argnums);
    return Native::vjp(primals, cotangents, argnums, outputs);
  }

 protected:
  Arrays stored(const Arrays& in) {
    Arrays parts;
    for (int i = 1; i <= how_.inputs(); i++) parts.push_back(row_major(in[i]));
    in_large_pages(in[1].data<void>(), in[1].nbytes());
    return parts;
  }
  QuantizedMatmul call(const mx::array& x, const mx::array& out) const {
    QuantizedMatmul c{};
    c.x = x.data<void>(), c.x_type = type_of(x.dtype());
    c.y = const_cast<void*>(static_cast<const void*>(out.data<void>())), c.y_type = type_of(out.dtype());
    c.k = x.shape(-1), c.n = out.shape(-1);
    c.x_stride = c.k, c.y_stride = c.n;
    c.transpose = how_.transpose, c.int8 = how_.int8;
    return c;
  }
  How how_;
};

class QuantizedMatmulPrimitive : public Product {
 public:
  using Product::Product;
  const char* name() const override { return "QgraphQuantizedMatmul"; }
  bool is_equivalent(const mx::Primitive& o) const override {
    auto* p = dynamic_cast<const QuantizedMatmulPrimitive*>(&o);
    return p && p->how_ == how_;
  }

  static mx::Shape shape(const How& how, const mx::array& x, const mx::array& w) {
    auto [k, n] = how.inner_outer(logical_shape(how.scheme, w));
    auto out = x.shape();
    out.back() = n;
    if (w.ndim() == 2) return out;
    if (x.ndim() < 3) throw std::invalid_argument("quantized_matmul: x of rank < 3 with a stack of weights");
    mx::Shape xs(x.shape().begin(), x.shape().end() - 2), ws(w.shape().begin(), w.shape().end() - 2);
    auto batch = mx::broadcast_shapes(xs, ws);
    batch.push_back(x.shape(-2));
    batch.push_back(n);
    return batch;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {shape(how_, in[0], in[1])}; }

  // In x the gradient is the product with the weight the other way round; in the rest it is the formula's.
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) override {
    if (argnums != std::vector<int>{0}) return Product::vjp(primals, cotangents, argnums, outputs);
    How back = how_;
    back.transpose = !how_.transpose;
    back.int8 = false;
    Arrays in = primals;
    in[0] = mx::astype(cotangents[0], primals[0].dtype());
    auto dx = make(back, in, stream(), primals[0].dtype());
    auto& x = primals[0];
    if (dx.shape() == x.shape()) return {dx};
    std::vector<int> summed;  // the batch axes along which x was broadcast
    for (int i = 0, extra = static_cast<int>(dx.ndim() - x.ndim()); i < static_cast<int>(dx.ndim()) - 2; i++)
      if (i < extra || x.shape(i - extra) != dx.shape(i)) summed.push_back(i);
    return {mx::reshape(mx::sum(dx, summed, true, stream()), x.shape(), stream())};
  }

  static mx::array make(const How& how, const Arrays& in, mx::Stream s, std::optional<mx::Dtype> dtype = std::nullopt) {
    check_product(how, in[0], in[1]);
    auto out = dtype.value_or(result_dtype(how, in[0], in[2]));
    auto formula = product_formula(how, out, [](const Arrays&, mx::array x, mx::array w) { return mx::matmul(x, w); });
    auto primitive = std::make_shared<QuantizedMatmulPrimitive>(s, how, formula);
    return mx::array(shape(how, in[0], in[1]), out, std::move(primitive), in);
  }

 protected:
  void run(const Arrays& in, mx::array& out) override {
    allocate(out);
    if (out.size() == 0) return;
    auto parts = stored(in);
    Stack stack(how_.scheme, parts, how_.global);
    Rows rows{};
    bool strided = in[0].ndim() && (in[0].strides(-1) == 1 || in[0].shape(-1) == 1) && rows_of(in[0], rows) &&
                   rows.sizes[1] == 1 && in[1].ndim() == 2;
    auto x = strided ? in[0] : row_major(in[0]);
    auto c = call(x, out);
    c.m = in[1].ndim() == 2 ? out.size() / c.n : out.shape(-2);
    if (strided && rows.sizes[0] > 1) c.x_stride = rows.strides[0];
    if (in[1].ndim() == 2)
      return dispatch(in, out, [c, stack]() mutable {
        c.w = stack.at(0);
        kernels().quantized_matmul(c);
      });
    auto without = [](const mx::Shape& s) { return mx::Shape(s.begin(), s.end() - 2); };
    auto xs = offsets(without(x.shape()), without(out.shape()), c.m * c.k);
    auto ws = offsets(without(in[1].shape()), without(out.shape()), 1);
    dispatch(in, out, [c, stack, xs, ws]() {
      for (size_t i = 0; i < xs.size(); i++) {
        auto one = c;
        one.x = static_cast<const char*>(c.x) + xs[i] * size_of(c.x_type);
        one.y = static_cast<char*>(c.y) + static_cast<int64_t>(i) * c.m * c.n * size_of(c.y_type);
        one.w = stack.at(ws[i]);
        kernels().quantized_matmul(one);
      }
    });
  }
};

// y[i] = x[lhs[i]] w[rhs[i]]; matrices are counted through all leading axes. Inputs: x, the weight's, lhs, rhs.
class GatherPrimitive : public Product {
 public:
  using Product::Product;
  const char* name() const override { return "QgraphGatherQmm"; }
  bool is_equivalent(const mx::Primitive& o) const override {
    auto* p = dynamic_cast<const GatherPrimitive*>(&o);
    return p && p->how_ == how_;
  }

  static mx::Shape shape(const How& how, const Arrays& in) {
    auto out = in[how.inputs() + 1].shape();
    out.push_back(in[0].shape(-2));
    out.push_back(how.inner_outer(logical_shape(how.scheme, in[1])).second);
    return out;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {shape(how_, in)}; }

  static Formula formula(const How& how, mx::Dtype dtype) {
    return product_formula(how, dtype, [lhs = how.inputs() + 1](const Arrays& in, mx::array x, mx::array w) {
      auto flat = [](const mx::array& a) { return mx::flatten(a, 0, -3); };
      return mx::matmul(mx::take(flat(x), in[lhs], 0), mx::take(flat(w), in[lhs + 1], 0));
    });
  }

 protected:
  void run(const Arrays& in, mx::array& out) override {
    allocate(out);
    if (out.size() == 0) return;
    auto parts = stored(in);
    Stack stack(how_.scheme, parts, how_.global);
    auto x = row_major(in[0]), lhs = row_major(in[how_.inputs() + 1]), rhs = row_major(in[how_.inputs() + 2]);
    auto c = call(x, out);
    int64_t m = x.shape(-2), lefts = x.size() / std::max<int64_t>(1, m * c.k);
    int64_t rights = in[1].size() / std::max<int64_t>(1, static_cast<int64_t>(in[1].shape(-1)) * in[1].shape(-2));
    dispatch(in, out, [=, l = lhs.data<void>(), ld = lhs.dtype(), r = rhs.data<void>(), rd = rhs.dtype(),
                       count = static_cast<int64_t>(rhs.size())]() {
      each_matrix(c, stack, m, integers(l, ld, count), integers(r, rd, count), lefts, rights);
    });
  }

 private:
  // One product for each matrix that is used, of all the rows that use it.
  static void each_matrix(QuantizedMatmul c, const Stack& stack, int64_t m, const std::vector<int64_t>& lhs,
                          const std::vector<int64_t>& rhs, int64_t lefts, int64_t rights) {
    std::vector<int64_t> order(rhs.size()), x_rows, y_rows;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rhs[a] < rhs[b]; });
    for (size_t i = 0; i < order.size();) {
      int64_t matrix = rhs[order[i]];
      x_rows.clear(), y_rows.clear();
      for (; i < order.size() && rhs[order[i]] == matrix; i++) {
        bool valid = matrix >= 0 && matrix < rights && lhs[order[i]] >= 0 && lhs[order[i]] < lefts;
        if (!valid) blank(c, order[i] * m, m);
        for (int64_t row = 0; valid && row < m; row++)
          x_rows.push_back(lhs[order[i]] * m + row), y_rows.push_back(order[i] * m + row);
      }
      if (x_rows.empty()) continue;
      c.m = static_cast<int64_t>(x_rows.size());
      c.x_rows = x_rows.data(), c.y_rows = y_rows.data();
      c.w = stack.at(matrix);
      kernels().quantized_matmul(c);
    }
  }
  // An index out of range reads nothing: its rows are NaN, whose bits begin with ones in every type.
  static void blank(const QuantizedMatmul& c, int64_t row, int64_t rows) {
    auto* y = static_cast<char*>(c.y) + row * c.n * size_of(c.y_type);
    std::fill_n(y, rows * c.n * size_of(c.y_type), static_cast<char>(0xff));
  }
};

// Rows of a packed matrix, all or chosen ones. Inputs: the weight's, then the indices where there are any.
class DequantizePrimitive : public Native {
 public:
  DequantizePrimitive(mx::Stream s, How how, bool taking, mx::Dtype dtype)
      : Native(s, formula(how, taking, dtype)), how_(how), taking_(taking), dtype_(dtype) {}
  const char* name() const override { return taking_ ? "QgraphQuantizedTake" : "QgraphDequantize"; }
  bool is_equivalent(const mx::Primitive& o) const override {
    auto* p = dynamic_cast<const DequantizePrimitive*>(&o);
    return p && p->how_ == how_ && p->taking_ == taking_ && p->dtype_ == dtype_;
  }
  static mx::Shape shape(const How& how, bool taking, const Arrays& in) {
    auto shape = logical_shape(how.scheme, in[0]);
    if (!taking) return shape;
    auto out = in.back().shape();
    out.push_back(shape.back());
    return out;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {shape(how_, taking_, in)}; }
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) override {
    check_gradients(how_, 0, argnums);
    return Native::vjp(primals, cotangents, argnums, outputs);
  }

 protected:
  void run(const Arrays& in, mx::array& out) override {
    allocate(out);
    if (out.size() == 0) return;
    Arrays parts;
    for (int i = 0; i < how_.inputs(); i++) parts.push_back(row_major(in[i]));
    Stack stack(how_.scheme, parts, how_.global);
    Dequantize c{};
    c.y = out.data<void>(), c.y_type = type_of(out.dtype());
    c.count = out.size() / out.shape(-1);
    if (!taking_)
      return dispatch(in, out, [c, stack]() mutable {
        c.w = stack.at(0);
        c.w.rows = c.count;  // a stack lies in memory as one matrix
        kernels().dequantize(c);
      });
    auto indices = row_major(in.back());
    dispatch(in, out, [c, stack, i = indices.data<void>(), d = indices.dtype()]() mutable {
      c.w = stack.at(0);
      auto rows = integers(i, d, c.count);
      std::vector<int64_t> blank;
      for (int64_t n = 0; n < c.count; n++) {
        if (rows[n] < 0) rows[n] += c.w.rows;  // counted from the end
        if (rows[n] < 0 || rows[n] >= c.w.rows) blank.push_back(n), rows[n] = 0;
      }
      if (c.w.rows) {
        c.indices = rows.data();
        kernels().dequantize(c);
      }
      int64_t bytes = c.w.columns * size_of(c.y_type);
      for (int64_t n : blank) std::fill_n(static_cast<char*>(c.y) + n * bytes, bytes, static_cast<char>(0xff));
    });
  }

 private:
  static Formula formula(How how, bool taking, mx::Dtype dtype) {
    return [=](const Arrays& in) -> Arrays {
      Arrays parts(in.begin(), in.begin() + how.inputs());
      auto w = mx::astype(dequantized(how.scheme, parts, how.global), dtype);
      return {taking ? mx::take(w, in.back(), 0) : w};
    };
  }
  How how_;
  bool taking_;
  mx::Dtype dtype_;
};

How how_of(const std::string& mode, int bits, int group, bool transpose, const Optional& global, const std::string& activations) {
  if (!activations.empty() && activations != "int8")
    throw std::invalid_argument("activations are '' (exact) or 'int8', not '" + activations + "'");
  return {scheme(mode, bits, group), transpose, activations == "int8", global.has_value()};
}

Arrays inputs_of(const How& how, const mx::array& x, const mx::array& w, const mx::array& scales,
                 const Optional& biases, const Optional& global) {
  Arrays in = components(how.scheme, w, scales, biases, global);
  in.insert(in.begin(), x);
  return in;
}

mx::array quantized_matmul(const mx::array& x, const mx::array& w, const mx::array& scales, const Optional& biases,
                           const Optional& global, bool transpose, int group_size, int bits,
                           const std::string& mode, const std::string& activations) {
  How how = how_of(mode, bits, group_size, transpose, global, activations);
  return QuantizedMatmulPrimitive::make(how, inputs_of(how, x, w, scales, biases, global), current_stream());
}

mx::array all_of(const mx::array& stack) {  // the indices of all matrices, in order
  mx::Shape batch(stack.shape().begin(), stack.shape().end() - 2);
  int64_t n = 1;
  for (int size : batch) n *= size;
  return mx::reshape(mx::arange(static_cast<int>(n), mx::uint32), batch);
}

mx::array gather_qmm(const mx::array& x, const mx::array& w, const mx::array& scales, const Optional& biases,
                     const Optional& global, const Optional& lhs, const Optional& rhs, bool transpose,
                     int group_size, int bits, const std::string& mode, bool /* sorted_indices */,
                     const std::string& activations) {
  How how = how_of(mode, bits, group_size, transpose, global, activations);
  Arrays in = inputs_of(how, x, w, scales, biases, global);
  check_product(how, x, w);
  if (x.ndim() < 2) throw std::invalid_argument("gather_qmm: x is not a stack of matrices");
  auto indices = mx::broadcast_arrays({lhs.value_or(all_of(x)), rhs.value_or(all_of(w))});
  for (auto& i : indices) {
    if (!mx::issubdtype(i.dtype(), mx::integer)) throw std::invalid_argument("gather_qmm: indices are integers");
    in.push_back(i);
  }
  auto dtype = result_dtype(how, x, scales);
  auto primitive = std::make_shared<GatherPrimitive>(current_stream(), how, GatherPrimitive::formula(how, dtype));
  return mx::array(GatherPrimitive::shape(how, in), dtype, std::move(primitive), in);
}

mx::array dequantize(const mx::array& w, const mx::array& scales, const Optional& biases, const Optional& global,
                     const Optional& indices, int group_size, int bits, const std::string& mode, mx::Dtype dtype) {
  How how = how_of(mode, bits, group_size, true, global, "");
  type_of(dtype);
  Arrays in = components(how.scheme, w, scales, biases, global);
  if (indices) {
    if (w.ndim() != 2) throw std::invalid_argument("quantized_take: the weight is not a matrix");
    if (!mx::issubdtype(indices->dtype(), mx::integer))
      throw std::invalid_argument("quantized_take: indices are integers");
    in.push_back(*indices);
  }
  auto primitive = std::make_shared<DequantizePrimitive>(current_stream(), how, indices.has_value(), dtype);
  return mx::array(DequantizePrimitive::shape(how, indices.has_value(), in), dtype, std::move(primitive), in);
}

}  // namespace

void bind_quantized(nb::module_& m) {
  using namespace nb::literals;
  auto none = nb::none();
  m.def("quantized_matmul", &quantized_matmul, "x"_a, "w"_a, "scales"_a, "biases"_a.none(), "global_scale"_a.none(),
        nb::kw_only(), "transpose"_a, "group_size"_a, "bits"_a, "mode"_a, "activations"_a = "");
  m.def("gather_qmm", &gather_qmm, "x"_a, "w"_a, "scales"_a, "biases"_a.none(), "global_scale"_a.none(),
        "lhs_indices"_a.none(), "rhs_indices"_a.none(), nb::kw_only(), "transpose"_a, "group_size"_a, "bits"_a,
        "mode"_a, "sorted_indices"_a, "activations"_a = "");
  m.def("quantized_take",
        [](const mx::array& w, const mx::array& scales, const Optional& biases, const Optional& global,
           const mx::array& indices, int group_size, int bits, const std::string& mode, mx::Dtype dtype) {
          return dequantize(w, scales, biases, global, indices, group_size, bits, mode, dtype);
        },
        "w"_a, "scales"_a, "biases"_a.none(), "global_scale"_a.none(), "indices"_a, nb::kw_only(), "group_size"_a,
        "bits"_a, "mode"_a, "dtype"_a);
  m.def("dequantize",
        [](const mx::array& w, const mx::array& scales, const Optional& biases, const Optional& global,
           int group_size, int bits, const std::string& mode, mx::Dtype dtype) {
          return dequantize(w, scales, biases, global, std::nullopt, group_size, bits, mode, dtype);
        },
        "w"_a, "scales"_a, "biases"_a.none(), "global_scale"_a.none(), nb::kw_only(), "group_size"_a, "bits"_a,
        "mode"_a, "dtype"_a);
}

}  // namespace qgraph
