// rms_norm, layer_norm and softmax along the last axis.
#include <string>

#include "../module.h"
#include "../primitive.h"
#include "mlx/backend/common/utils.h"
#include "mlx/fast.h"

namespace qgraph {
namespace {

using Optional = std::optional<mx::array>;

// Rows in, rows of the same shape out.
class RowsPrimitive : public Native {
 public:
  using Native::Native;
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[0].shape()}; }

 protected:
  // Allocates `out`, where x's own memory cannot be written over, and says where the rows lie.
  Rows rows(const mx::array& x, mx::array& out) {
    Rows rows{};
    rows.type = type_of(x.dtype());
    if (x.flags().row_contiguous && mx::is_donatable(x, out)) out.copy_shared_buffer(x);
    else allocate(out);
    bool fits = (x.strides(-1) == 1 || x.shape(-1) == 1) && rows_of(x, rows);
    if (fits) {
      rows.x = x.data<void>();
    } else {
      mx::array copy = row_major(x);
      rows_of(copy, rows);
      rows.x = copy.data<void>();
    }
    rows.y = out.data<void>();
    return rows;
  }
};

void check_rows(const char* op, const mx::array& x) {
  type_of(x.dtype());
  if (x.ndim() == 0) throw std::invalid_argument(std::string(op) + ": x has no axis");
}

void check_parameter(const char* op, const char* what, const Optional& parameter, const mx::array& x) {
  if (!parameter) return;
  type_of(parameter->dtype());
  if (parameter->ndim() != 1 || parameter->shape(0) != x.shape(-1))
    throw std::invalid_argument(std::string(op) + ": the " + what + " must have one axis of " +
                                std::to_string(x.shape(-1)) + " numbers");
}

class NormPrimitive : public RowsPrimitive {
 public:
  // Inputs: x, then the weight and the bias where there is one.
  struct How {
    bool centred, weight, bias;
    float eps;
    bool operator==(const How&) const = default;
  };

  static mx::array make(How how, const mx::array& x, const Optional& weight, Optional bias) {
    const char* op = how.centred ? "layer_norm" : "rms_norm";
    check_rows(op, x);
    check_parameter(op, "weight", weight, x);
    check_parameter(op, "bias", bias, x);
    auto stream = current_stream();
    auto dtype = x.dtype();
    Arrays inputs{x};
    if (weight) {
      dtype = mx::promote_types(dtype, weight->dtype());
      if (bias) dtype = mx::promote_types(dtype, bias->dtype());
      // The kernel knows one type of parameters.
      bool apart = bias && bias->dtype() != weight->dtype();
      if (apart) bias = mx::astype(*bias, mx::float32, stream);
      inputs.push_back(apart ? mx::astype(*weight, mx::float32, stream) : *weight);
    } else if (bias) {
      bias = mx::astype(*bias, dtype, stream);  // as MLX: a bias alone has no say in the result's type
    }
    if (bias) inputs.push_back(*bias);
    auto primitive = std::make_shared<NormPrimitive>(stream, formula(how, dtype, stream), how);
    return mx::array(x.shape(), dtype, std::move(primitive), std::move(inputs));
  }

  NormPrimitive(mx::Stream stream, Formula formula, How how)
      : RowsPrimitive(stream, std::move(formula)), how_(how) {}
  const char* name() const override { return how_.centred ? "QgraphLayerNorm" : "QgraphRmsNorm"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto* norm = dynamic_cast<const NormPrimitive*>(&other);
    return norm && norm->how_ == how_;
  }

 protected:
  void run(const Arrays& in, mx::array& out) override {
    if (out.size() == 0) return allocate(out);
    Norm call{};
    call.y_type = type_of(out.dtype());
    call.eps = how_.eps, call.centred = how_.centred;
    size_t next = 1;
    if (how_.weight) call.weight = parameter(in[next++], call);
    if (how_.bias) call.bias = parameter(in[next], call);
    call.rows = rows(in[0], out);
    dispatch(in, out, [call] { kernels().norm(call); });
  }

 private:
  const void* parameter(const mx::array& a, Norm& call) {
    call.parameter_type = type_of(a.dtype());
    return row_major(a).data<void>();
  }

  static Formula formula(How how, mx::Dtype dtype, mx::Stream s) {
    return [=](const Arrays& in) -> Arrays {
      auto wide = [&](const mx::array& a) { return mx::astype(a, mx::float32, s); };
      size_t next = 1;
      Optional weight, bias;
      if (how.weight) weight = wide(in[next++]);
      if (how.bias) bias = wide(in[next]);
      auto y = how.centred ? mx::fast::layer_norm(wide(in[0]), weight, bias, how.eps, s)
                           : mx::fast::rms_norm(wide(in[0]), weight, how.eps, s);
      return {mx::astype(y, dtype, s)};
    };
  }

  How how_;
};

class SoftmaxPrimitive : public RowsPrimitive {
 public:
  static mx::array make(const mx::array& x) {
    check_rows("softmax", x);
    auto s = current_stream();
    Formula formula = [s, dtype = x.dtype()](const Arrays& in) -> Arrays {
      return {mx::astype(mx::softmax(mx::astype(in[0], mx::float32, s), -1, true, s), dtype, s)};
    };
    return mx::array(x.shape(), x.dtype(), std::make_shared<SoftmaxPrimitive>(s, std::move(formula)), {x});
  }

  using RowsPrimitive::RowsPrimitive;
  const char* name() const override { return "QgraphSoftmax"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return dynamic_cast<const SoftmaxPrimitive*>(&other) != nullptr;
  }

 protected:
  void run(const Arrays& in, mx::array& out) override {
    if (out.size() == 0) return allocate(out);
    Softmax call{rows(in[0], out)};
    dispatch(in, out, [call] { kernels().softmax(call); });
  }
};

mx::array rms_norm(const mx::array& x, const Optional& weight, float eps) {
  return NormPrimitive::make({false, weight.has_value(), false, eps}, x, weight, std::nullopt);
}

mx::array layer_norm(const mx::array& x, const Optional& weight, const Optional& bias, float eps) {
  return NormPrimitive::make({true, weight.has_value(), bias.has_value(), eps}, x, weight, bias);
}

}  // namespace

void bind_norms(nb::module_& m) {
  using namespace nb::literals;
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a.none(), "eps"_a);
  m.def("layer_norm", &layer_norm, "x"_a, "weight"_a.none(), "bias"_a.none(), "eps"_a);
  m.def("softmax", &SoftmaxPrimitive::make, "x"_a);
}

}  // namespace qgraph
