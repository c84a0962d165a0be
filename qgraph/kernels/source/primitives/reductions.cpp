// max, argmax and logsumexp along the last axis.
#include <string>

#include "../module.h"
#include "../primitive.h"

namespace qgraph {
namespace {

class ReducePrimitive : public Native {
 public:
  static mx::array make(Reduction kind, const char* name, const mx::array& x, bool keepdims) {
    type_of(x.dtype());
    if (x.ndim() == 0) throw std::invalid_argument(std::string(name) + ": x has no axis");
    if (x.shape(-1) == 0) throw std::invalid_argument(std::string(name) + ": x has no numbers along its axis");
    auto s = current_stream();
    auto dtype = kind == Reduction::argmax ? mx::uint32 : x.dtype();
    Formula formula = [=](const Arrays& in) -> Arrays {
      if (kind == Reduction::argmax) return {mx::argmax(in[0], -1, keepdims, s)};
      if (kind == Reduction::max) return {mx::max(in[0], -1, keepdims, s)};
      return {mx::astype(mx::logsumexp(mx::astype(in[0], mx::float32, s), -1, keepdims, s), dtype, s)};
    };
    auto primitive = std::make_shared<ReducePrimitive>(s, std::move(formula), kind, keepdims);
    return mx::array(shape(x, keepdims), dtype, std::move(primitive), {x});
  }

  ReducePrimitive(mx::Stream stream, Formula formula, Reduction kind, bool keepdims)
      : Native(stream, std::move(formula)), kind_(kind), keepdims_(keepdims) {}
  const char* name() const override {
    if (kind_ == Reduction::max) return "QgraphMax";
    return kind_ == Reduction::argmax ? "QgraphArgmax" : "QgraphLogsumexp";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto* o = dynamic_cast<const ReducePrimitive*>(&other);
    return o && o->kind_ == kind_ && o->keepdims_ == keepdims_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {shape(in[0], keepdims_)}; }

 protected:
  void run(const Arrays& in, mx::array& out) override {
    allocate(out);
    if (out.size() == 0) return;
    Reduce call{{}, kind_};
    const bool fits = (in[0].strides(-1) == 1 || in[0].shape(-1) == 1) && rows_of(in[0], call.rows);
    const mx::array x = fits ? in[0] : row_major(in[0]);
    if (!fits) rows_of(x, call.rows);
    call.rows.type = type_of(x.dtype()), call.rows.x = x.data<void>(), call.rows.y = out.data<void>();
    dispatch(in, out, [call] { kernels().reduce(call); });
  }

 private:
  static mx::Shape shape(const mx::array& x, bool keepdims) {
    mx::Shape shape(x.shape().begin(), x.shape().end() - 1);
    if (keepdims) shape.push_back(1);
    return shape;
  }

  Reduction kind_;
  bool keepdims_;
};

}  // namespace

void bind_reductions(nb::module_& m) {
  using namespace nb::literals;
  auto define = [&](const char* name, Reduction kind) {
    auto make = [=](const mx::array& x, bool keepdims) { return ReducePrimitive::make(kind, name, x, keepdims); };
    m.def(name, make, "x"_a, "keepdims"_a = false);
  };
  define("max", Reduction::max);
  define("argmax", Reduction::argmax);
  define("logsumexp", Reduction::logsumexp);
}

}  // namespace qgraph
