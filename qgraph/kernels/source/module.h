// What the files in primitives/ add to the Python module.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

namespace qgraph {

namespace nb = nanobind;

void bind_quantized(nb::module_&);
void bind_matmul(nb::module_&);
void bind_attention(nb::module_&);
void bind_norms(nb::module_&);
void bind_reductions(nb::module_&);
void bind_rope(nb::module_&);
void bind_elementwise(nb::module_&);
void bind_tape(nb::module_&);

}  // namespace qgraph
