// fastbptt._reference: the slow reference for the tests, and nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "reference/reference.h"

namespace py = pybind11;
namespace reference = fastbptt::reference;

namespace {

using Array = py::array_t<double, py::array::c_style>;
using Shape = std::vector<py::ssize_t>;

reference::Cell cell_named(const std::string& name) {
  if (name == "rnn_tanh") return reference::Cell::rnn_tanh;
  if (name == "rnn_relu") return reference::Cell::rnn_relu;
  if (name == "lstm") return reference::Cell::lstm;
  if (name == "gru") return reference::Cell::gru;
  if (name == "gru_reset_before") return reference::Cell::gru_reset_before;
  throw py::value_error("cell: no cell is called '" + name + "'");
}

const double* checked(const char* name, const Array& array, const Shape& shape) {
  if (Shape(array.shape(), array.shape() + array.ndim()) != shape) {
    throw py::value_error(std::string(name) + ": the shape does not fit x and h0");
  }
  return array.data();
}

const double* checked(const char* name, const std::optional<Array>& array, const Shape& shape) {
  return array ? checked(name, *array, shape) : nullptr;
}

Array to_array(const std::vector<double>& values, const Shape& shape) {
  Array out(shape);
  std::copy(values.begin(), values.end(), out.mutable_data());
  return out;
}

py::dict run(const std::string& cell, const Array& x, const Array& h0,
             const std::optional<Array>& c0, const Array& w_ih, const Array& w_hh,
             const std::optional<Array>& b_ih, const std::optional<Array>& b_hh,
             const std::optional<Array>& grad_y, const std::optional<Array>& grad_h,
             const std::optional<Array>& grad_c) {
  if (x.ndim() != 3 || h0.ndim() != 2) {
    throw py::value_error("x wants three axes [T, B, I] and h0 two [B, H]");
  }
  const py::ssize_t T = x.shape(0), B = x.shape(1), I = x.shape(2), H = h0.shape(1);
  reference::Problem p{};
  p.cell = cell_named(cell);
  const py::ssize_t GH = reference::gates(p.cell) * H;
  p.T = static_cast<std::size_t>(T);
  p.B = static_cast<std::size_t>(B);
  p.I = static_cast<std::size_t>(I);
  p.H = static_cast<std::size_t>(H);
  p.x = x.data();
  p.h0 = checked("h0", h0, {B, H});
  p.c0 = checked("c0", c0, {B, H});
  p.w_ih = checked("w_ih", w_ih, {GH, I});
  p.w_hh = checked("w_hh", w_hh, {GH, H});
  p.b_ih = checked("b_ih", b_ih, {GH});
  p.b_hh = checked("b_hh", b_hh, {GH});
  p.grad_y = checked("grad_y", grad_y, {T, B, H});
  p.grad_h = checked("grad_h", grad_h, {B, H});
  p.grad_c = checked("grad_c", grad_c, {B, H});

  const reference::Result result = reference::run(p);
  const bool has_c = p.cell == reference::Cell::lstm;
  py::dict out;
  out["y"] = to_array(result.y, {T, B, H});
  out["h"] = to_array(result.h, {B, H});
  out["c"] = has_c ? py::object(to_array(result.c, {B, H})) : py::none();
  out["grad_x"] = to_array(result.grad_x, {T, B, I});
  out["grad_h0"] = to_array(result.grad_h0, {B, H});
  out["grad_c0"] = has_c ? py::object(to_array(result.grad_c0, {B, H})) : py::none();
  out["grad_w_ih"] = to_array(result.grad_w_ih, {GH, I});
  out["grad_w_hh"] = to_array(result.grad_w_hh, {GH, H});
  out["grad_b_ih"] = to_array(result.grad_b_ih, {GH});
  out["grad_b_hh"] = to_array(result.grad_b_hh, {GH});
  return out;
}

}  // namespace

PYBIND11_MODULE(_reference, m) {
  m.doc() = "One recurrent layer, forward and backward, as the formulas say it. Float64 only.";
  m.def("run", &run, py::arg("cell"), py::arg("x").noconvert(), py::arg("h0").noconvert(),
        py::arg("c0").noconvert(), py::arg("w_ih").noconvert(), py::arg("w_hh").noconvert(),
        py::arg("b_ih").noconvert(), py::arg("b_hh").noconvert(), py::arg("grad_y").noconvert(),
        py::arg("grad_h").noconvert(), py::arg("grad_c").noconvert(),
        "Outputs, last state and all gradients of one layer as a dict; None stands for zeros.");
}
