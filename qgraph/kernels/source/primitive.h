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

// Kernels that are kept, to be called again and again, and the buffers whose addresses they know.
struct Recording {
  std::vector<std::function<void()>> calls;
  std::vector<std::shared_ptr<mx::array::Data>> buffers;
};

// Where this thread's kernels go while they are recorded; null: to the stream, to be run.
extern thread_local Recording* recording;

template <class F> void send(mx::Stream stream, F&& kernel) {
  if (recording) recording->calls.emplace_back(std::forward<F>(kernel));
  else mx::cpu::get_command_encoder(stream).dispatch(std::forward<F>(kernel));
}

// The elements of a strided array, of `size` bytes each, to the places of another one of the same shape.
void copy_elements(const void* from, const mx::Strides& from_strides, void* to, const mx::Strides& to_strides,
                   const mx::Shape& shape, size_t size);

// `a`, or a row-major copy of it that lives until the kernels that are sent next have run.
mx::array row_major(const mx::array& a, mx::Stream stream);

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
    send(stream(), std::forward<F>(kernel));
  }
  mx::array row_major(const mx::array& a) { return qgraph::row_major(a, stream()); }

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
