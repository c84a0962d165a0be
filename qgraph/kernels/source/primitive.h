// What qgraph's MLX primitives share: a kernel for the CPU, and a formula of MLX's own ops for the rest.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <vector>

#include "kernels.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"
#include "mlx/utils.h"

namespace qgraph {

namespace mx = mlx::core;
using Arrays = std::vector<mx::array>;
using Formula = std::function<Arrays(const Arrays&)>;

// A primitive with one result. `formula` computes the same of the same inputs with MLX's ops: it is what
// mx.grad, mx.jvp and mx.vmap transform. A subclass gives name(), is_equivalent(), output_shapes() and run().
class Native : public mx::Primitive {
 public:
  Native(mx::Stream stream, Formula formula) : mx::Primitive(stream), formula_(std::move(formula)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override { run(inputs, outputs[0]); }
  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string(name()) + ": a kernel for the CPU was put on a GPU's stream");
  }
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override;
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override;

 protected:
  // Allocate `out` and dispatch the kernel.
  virtual void run(const Arrays& inputs, mx::array& out) = 0;

  template <class F> void dispatch(const Arrays& inputs, mx::array& out, F&& kernel) {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (auto& a : inputs) encoder.set_input_array(a);
    encoder.set_output_array(out);
    encoder.dispatch(std::forward<F>(kernel));
  }
  // `a`, or a row-major copy of it that lives until the kernel has run.
  mx::array row_major(const mx::array& a);

  Formula formula_;
};

// The stream of an op: the default one of the default device.
mx::Stream current_stream();

// The CPU's element types; throws std::invalid_argument for another dtype.
Type type_of(mx::Dtype dtype);
mx::Dtype dtype_of(Type type);

inline void allocate(mx::array& out) { out.set_data(mx::allocator::malloc(out.nbytes())); }

// The axes before the last as at most four sizes and strides, merged where the layout allows it; false where
// they are more. The last axis must be contiguous.
bool rows_of(const mx::array& a, Rows& rows);

}  // namespace qgraph
