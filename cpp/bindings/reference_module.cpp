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
using Flags = py::array_t<bool, py::array::c_style>;
using Shape = std::vector<py::ssize_t>;

reference::Cell cell_named(const std::string& name) {
  if (name == "rnn_tanh") return reference::Cell::rnn_tanh;
  if (name == "rnn_relu") return reference::Cell::rnn_relu;
  if (name == "lstm") return reference::Cell::lstm;
  if (name == "gru") return reference::Cell::gru;
  if (name == "gru_reset_before") return reference::Cell::gru_reset_before;
  if (name == "lstm_coupled") return reference::Cell::lstm_coupled;
  throw py::value_error("cell: no cell is called '" + name + "'");
}

template <class T>
const T* checked(const char* name, const py::array_t<T, py::array::c_style>& array,
                 const Shape& shape) {
  if (Shape(array.shape(), array.shape() + array.ndim()) != shape) {
    throw py::value_error(std::string(name) + ": the shape does not fit x and h0");
  }
  return array.data();
}

template <class T>
const T* checked(const char* name, const std::optional<py::array_t<T, py::array::c_style>>& array,
                 const Shape& shape) {
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
             const std::optional<Array>& grad_c, const std::optional<Flags>& resets,
             const std::optional<Array>& restart_h, const std::optional<Array>& restart_c,
             const std::optional<Flags>& mask, const std::optional<Array>& recurrent_mask,
             const std::optional<Array>& keep_h, const std::optional<Array>& keep_c,
             const std::optional<Array>& peephole, const std::optional<Array>& grad_cells,
             const std::optional<Array>& w_hr, const std::optional<Array>& gain_ih,
             const std::optional<Array>& gain_hh, const std::optional<Array>& gain_c,
             const std::optional<Array>& shift_c) {
  if (x.ndim() != 3 || h0.ndim() != 2) {
    throw py::value_error("x wants three axes [T, B, I] and h0 two [B, H]");
  }
  const py::ssize_t T = x.shape(0), B = x.shape(1), I = x.shape(2), R = h0.shape(1);
  if (w_hr && w_hr->ndim() != 2) throw py::value_error("w_hr wants two axes [P, H]");
  const py::ssize_t H = w_hr ? w_hr->shape(1) : R;
  reference::Problem p{};
  p.cell = cell_named(cell);
  const py::ssize_t GH = reference::gates(p.cell) * H;
  p.T = static_cast<std::size_t>(T);
  p.B = static_cast<std::size_t>(B);
  p.I = static_cast<std::size_t>(I);
  p.H = static_cast<std::size_t>(H);
  p.x = x.data();
  p.h0 = checked("h0", h0, {B, R});
  p.c0 = checked("c0", c0, {B, H});
  p.w_ih = checked("w_ih", w_ih, {GH, I});
  p.w_hh = checked("w_hh", w_hh, {GH, R});
  p.b_ih = checked("b_ih", b_ih, {GH});
  p.b_hh = checked("b_hh", b_hh, {GH});
  p.grad_y = checked("grad_y", grad_y, {T, B, R});
  p.grad_h = checked("grad_h", grad_h, {B, R});
  p.grad_c = checked("grad_c", grad_c, {B, H});
  p.resets = checked("resets", resets, {T, B});
  p.restart_h = checked("restart_h", restart_h, {R});
  p.restart_c = checked("restart_c", restart_c, {H});
  p.mask = checked("mask", mask, {T, B});
  p.recurrent_mask = checked("recurrent_mask", recurrent_mask, {B, R});
  p.keep_h = checked("keep_h", keep_h, {T, B, R});
  p.keep_c = checked("keep_c", keep_c, {T, B, H});
  p.peephole = checked("peephole", peephole, {GH - H});
  p.grad_cells = checked("grad_cells", grad_cells, {T, B, H});
  p.gain_ih = checked("gain_ih", gain_ih, {GH});
  p.gain_hh = checked("gain_hh", gain_hh, {GH});
  p.gain_c = checked("gain_c", gain_c, {H});
  p.shift_c = checked("shift_c", shift_c, {H});

  if (w_hr) {
    p.P = static_cast<std::size_t>(R);
    p.w_hr = checked("w_hr", *w_hr, {R, H});
  }

  const reference::Result result = reference::run(p);
  const bool has_c = reference::has_cell_state(p.cell);
  py::dict out;
  out["y"] = to_array(result.y, {T, B, R});
  out["h"] = to_array(result.h, {B, R});
  out["c"] = has_c ? py::object(to_array(result.c, {B, H})) : py::none();
  out["grad_x"] = to_array(result.grad_x, {T, B, I});
  out["grad_h0"] = to_array(result.grad_h0, {B, R});
  out["grad_c0"] = has_c ? py::object(to_array(result.grad_c0, {B, H})) : py::none();
  out["grad_w_ih"] = to_array(result.grad_w_ih, {GH, I});
  out["grad_w_hh"] = to_array(result.grad_w_hh, {GH, R});
  out["grad_b_ih"] = to_array(result.grad_b_ih, {GH});
  out["grad_b_hh"] = to_array(result.grad_b_hh, {GH});
  out["grad_restart_h"] = to_array(result.grad_restart_h, {R});
  if (has_c) {
    out["cells"] = to_array(result.cells, {T, B, H});
    out["grad_peephole"] = to_array(result.grad_peephole, {GH - H});
    out["grad_restart_c"] = to_array(result.grad_restart_c, {H});
  }
  if (w_hr) out["grad_w_hr"] = to_array(result.grad_w_hr, {R, H});
  if (gain_ih) {
    out["grad_gain_ih"] = to_array(result.grad_gain_ih, {GH});
    out["grad_gain_hh"] = to_array(result.grad_gain_hh, {GH});
    out["grad_gain_c"] = to_array(result.grad_gain_c, {H});
    out["grad_shift_c"] = to_array(result.grad_shift_c, {H});
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_reference, m) {
  m.doc() = "One recurrent layer, forward and backward, as the formulas say it. Float64 only.";
  m.def("run", &run, py::arg("cell"), py::arg("x").noconvert(), py::arg("h0").noconvert(),
        py::arg("c0").noconvert(), py::arg("w_ih").noconvert(), py::arg("w_hh").noconvert(),
        py::arg("b_ih").noconvert(), py::arg("b_hh").noconvert(), py::arg("grad_y").noconvert(),
        py::arg("grad_h").noconvert(), py::arg("grad_c").noconvert(), py::kw_only(),
        py::arg("resets").noconvert() = py::none(), py::arg("restart_h").noconvert() = py::none(),
        py::arg("restart_c").noconvert() = py::none(), py::arg("mask").noconvert() = py::none(),
        py::arg("recurrent_mask").noconvert() = py::none(),
        py::arg("keep_h").noconvert() = py::none(), py::arg("keep_c").noconvert() = py::none(),
        py::arg("peephole").noconvert() = py::none(),
        py::arg("grad_cells").noconvert() = py::none(), py::arg("w_hr").noconvert() = py::none(),
        py::arg("gain_ih").noconvert() = py::none(), py::arg("gain_hh").noconvert() = py::none(),
        py::arg("gain_c").noconvert() = py::none(), py::arg("shift_c").noconvert() = py::none(),
        "Outputs, last state and all gradients of one layer as a dict; None stands for zeros.");
}
