// The Python module: qgraph's MLX primitives as functions of mx.arrays.
#include "module.h"

#include "cpu.h"
#include "mlx/version.h"
#include "pool.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  m.doc() = "Native CPU kernels as MLX primitives; built on demand by qgraph.kernels.";
  m.attr("mlx_version") = mlx::core::version();
  m.def("instruction_sets", &qgraph::instruction_sets);
  m.def("instruction_set", [] { return std::string(qgraph::kernels().name); });
  m.def("use", &qgraph::use, nb::arg("instruction_set"));
  m.def("threads", &qgraph::threads);
  m.def("set_threads", &qgraph::set_threads, nb::arg("n"));
  qgraph::bind_quantized(m);
  qgraph::bind_matmul(m);
  qgraph::bind_attention(m);
  qgraph::bind_norms(m);
  qgraph::bind_rope(m);
  qgraph::bind_elementwise(m);
  qgraph::bind_tape(m);
}
