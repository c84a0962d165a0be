// The Python module: qgraph's MLX primitives as functions of mx.arrays.
#include "module.h"

#include "cpu.h"
#include "mlx/version.h"
#include "pool.h"

namespace nb = nanobind;

namespace {

// The version of the headers, not of the library that is loaded: the two must agree.
std::string built_for() {
  auto part = [](int number) { return std::to_string(number); };
  return part(MLX_VERSION_MAJOR) + "." + part(MLX_VERSION_MINOR) + "." + part(MLX_VERSION_PATCH);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native CPU kernels as MLX primitives; built on demand by qgraph.kernels.";
  m.attr("mlx_version") = built_for();
  m.def("instruction_sets", &qgraph::instruction_sets);
  m.def("instruction_set", [] { return std::string(qgraph::kernels().name); });
  m.def("use", &qgraph::use, nb::arg("instruction_set"));
  m.def("threads", &qgraph::threads);
  m.def("set_threads", &qgraph::set_threads, nb::arg("n"));
  qgraph::bind_quantized(m);
  qgraph::bind_matmul(m);
  qgraph::bind_attention(m);
  qgraph::bind_norms(m);
  qgraph::bind_reductions(m);
  qgraph::bind_rope(m);
  qgraph::bind_elementwise(m);
  qgraph::bind_tape(m);
}
