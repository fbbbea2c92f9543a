// The random numbers, for the tests to compare with the formula and with the published answers.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "arrays.h"
#include "concepts.h"
#include "fastbptt/random.h"

namespace fastbptt::bindings {
namespace {

std::array<std::uint32_t, 4> philox_block(std::array<std::uint32_t, 4> counter, std::uint64_t key) {
  philox<1>(counter.data(), key);
  return counter;
}

py::array mask_row(std::uint64_t key, std::uint32_t draw, Index layer, Index step, Index row,
                   double p, Index n) {
  py::array_t<float> mask(n);
  draw_mask(key, {static_cast<Draw>(draw), layer, step, row}, p, 1.0f, n, mask.mutable_data());
  return mask;
}

}  // namespace

void bind_random(py::module_& m) {
  m.def("philox", &philox_block, py::arg("counter"), py::arg("key"));
  m.def("draw_mask", &mask_row, py::arg("key"), py::arg("draw"), py::arg("layer"), py::arg("step"),
        py::arg("row"), py::arg("p"), py::arg("n"));
}

}  // namespace fastbptt::bindings
