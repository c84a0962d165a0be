// Chains of element-wise operations on broadcast operands of any layout.
#include "../module.h"
#include "chain_text.h"

namespace qgraph {
namespace {

mx::Shape broadcast(const Arrays& inputs) {
  auto shape = inputs[0].shape();
  for (size_t i = 1; i < inputs.size(); i++)
    if (inputs[i].shape() != shape) shape = mx::broadcast_shapes(shape, inputs[i].shape());
  return shape;
}

// How the elements of `a` lie in the order of a result of `shape`: axes that continue each other are one.
Operand laid_out(const mx::array& a, const mx::Shape& shape, uint8_t to) {
  Operand o{a.data<void>(), element_of(a.dtype()), to, 0, {}};
  int missing = static_cast<int>(shape.size()) - static_cast<int>(a.ndim());
  for (int i = 0; i < static_cast<int>(shape.size()); i++) {
    if (shape[i] == 1) continue;
    int64_t stride = i < missing || a.shape(i - missing) == 1 ? 0 : a.strides(i - missing);
    Axis* before = o.axes ? &o.layout[o.axes - 1] : nullptr;
    if (before && before->stride == stride * shape[i]) *before = {before->size * shape[i], stride};
    else o.layout[o.axes++] = {shape[i], stride};
  }
  if (o.axes == 0) o.layout[o.axes++] = {1, 0};
  return o;
}

// Whether the result may take the place of an operand: block by block, each is read before it is written.
bool can_hold(const mx::array& operand, const mx::array& out) {
  return operand.is_donatable() && operand.shape() == out.shape() && operand.itemsize() == out.itemsize() &&
         operand.flags().row_contiguous && operand.data_size() == operand.size();
}

class ElementwisePrimitive : public Native {
 public:
  ElementwisePrimitive(mx::Stream stream, std::string text, std::shared_ptr<const std::vector<Step>> steps,
                       const std::vector<mx::Dtype>& dtypes)
      : Native(stream, [steps](const Arrays& in) { return chain_formula(*steps, in); }),
        text_(std::move(text)),
        compiled_(std::make_shared<Compiled>(compile_chain(*steps, dtypes))) {}

  const char* name() const override { return "QgraphElementwise"; }
  bool is_equivalent(const mx::Primitive& o) const override {
    auto* p = dynamic_cast<const ElementwisePrimitive*>(&o);
    return p && p->text_ == text_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {broadcast(in)}; }

 protected:
  void run(const Arrays& in, mx::array& out) override {
    if (out.size() == 0) return allocate(out);
    std::vector<Operand> operands;
    const mx::array* place = nullptr;
    for (size_t i = 0; i < in.size(); i++) {
      operands.push_back(laid_out(in[i], out.shape(), compiled_->operands[i]));
      if (!place && can_hold(in[i], out)) place = &in[i];
    }
    place ? out.copy_shared_buffer(*place) : allocate(out);
    Elementwise e{};
    e.registers = compiled_->registers;
    e.result = compiled_->result;
    e.y = out.data<void>();
    e.y_type = element_of(out.dtype());
    e.count = static_cast<int64_t>(out.size());
    e.nanoseconds = compiled_->nanoseconds;
    dispatch(in, out, [e, operands = std::move(operands), c = compiled_]() mutable {
      e.operands = operands.data(), e.operand_count = static_cast<int>(operands.size());
      e.constants = c->constants.data(), e.constant_count = static_cast<int>(c->constants.size());
      e.instructions = c->instructions.data(), e.instruction_count = static_cast<int>(c->instructions.size());
      kernels().elementwise(e);
    });
  }

 private:
  std::string text_;
  std::shared_ptr<const Compiled> compiled_;
};

mx::array elementwise(const Arrays& inputs, const std::string& program) {
  int count = static_cast<int>(inputs.size());
  auto steps = std::make_shared<const std::vector<Step>>(parse_chain(program, count));
  auto shape = broadcast(inputs);
  if (shape.size() > Operand::AXES) throw std::invalid_argument("elementwise: more than 8 axes");
  std::vector<mx::Dtype> dtypes;
  for (auto& a : inputs) dtypes.push_back(a.dtype());
  auto dtype = steps->back().dtype;
  auto primitive = std::make_shared<ElementwisePrimitive>(current_stream(), program, steps, dtypes);
  return mx::array(std::move(shape), dtype, std::move(primitive), inputs);
}

}  // namespace

void bind_elementwise(nb::module_& m) {
  using namespace nb::literals;
  m.def("elementwise", &elementwise, "inputs"_a, "program"_a);
}

}  // namespace qgraph
