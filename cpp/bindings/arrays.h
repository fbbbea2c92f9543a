// NumPy arrays at the border: each check names the argument as the public API names it.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "fastbptt/buffer.h"
#include "fastbptt/recurrent.h"

namespace fastbptt::bindings {

namespace py = pybind11;

inline std::string text_of(const py::handle& object) { return py::str(object).cast<std::string>(); }

inline std::string shape_text(const std::vector<Index>& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i) text += ", ";
    text += shape[i] < 0 ? "any" : std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

inline std::vector<Index> shape_of(const py::array& array) {
  return {array.shape(), array.shape() + array.ndim()};
}

template <class S>
constexpr const char* dtype_name() {
  if constexpr (std::is_same_v<S, float>)
    return "float32";
  else if constexpr (std::is_same_v<S, double>)
    return "float64";
  else if constexpr (std::is_same_v<S, Bfloat16>)
    return "bfloat16";
  else if constexpr (std::is_same_v<S, bool>)
    return "bool";
  else
    return "int64";
}

// NumPy has no bfloat16 but that of ml_dtypes, which whoever made a layer of it has imported.
template <class S>
py::dtype dtype_of() {
  if constexpr (std::is_same_v<S, Bfloat16>)
    return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
  else
    return py::dtype::of<S>();
}

template <class S>
bool has_dtype(const py::array& array) {
  if constexpr (std::is_same_v<S, Bfloat16>)
    return array.dtype().equal(dtype_of<S>());
  else
    return py::isinstance<py::array_t<S>>(array);
}

// The array behind `object`, of dtype S and this shape (-1: any length). Nothing is converted:
// another dtype is the caller's mistake, and a silent copy would hide it.
template <class S>
py::array checked(const char* name, const py::handle& object, std::initializer_list<Index> shape) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(std::string(name) + ": got " +
                         text_of(py::type::of(object).attr("__name__")) +
                         ", wanted a NumPy array of " + dtype_name<S>());
  }
  py::array array = py::reinterpret_borrow<py::array>(object);
  if (!has_dtype<S>(array)) {
    throw py::type_error(std::string(name) + ": got dtype " + text_of(array.dtype()) + ", wanted " +
                         dtype_name<S>());
  }
  bool fits = array.ndim() == static_cast<Index>(shape.size());
  Index axis = 0;
  for (auto want = shape.begin(); fits && want != shape.end(); ++want, ++axis) {
    fits = *want < 0 || array.shape(axis) == *want;
  }
  if (!fits) {
    throw py::value_error(std::string(name) + ": got shape " + shape_text(shape_of(array)) +
                          ", wanted " + shape_text(shape));
  }
  return array;
}

// A new array for a result, not initialised. A large one lies in a buffer of the library's, whose
// memory serves the next training step once the caller has let go of it.
template <class S>
py::array new_array(const std::vector<Index>& shape) {
  Index size = 1;
  for (const Index n : shape) size *= n;
  if (size * Index(sizeof(S)) < Index(kept_block)) return py::array(dtype_of<S>(), shape);
  auto buffer = std::make_unique<Buffer<S>>(size);
  S* const data = buffer->data();
  py::capsule owner(buffer.get(), [](void* p) { delete static_cast<Buffer<S>*>(p); });
  buffer.release();
  return py::array(dtype_of<S>(), shape, data, owner);
}

template <class S>
const S* data(const py::array& array) {
  return static_cast<const S*>(array.data());
}

inline bool is_aligned(const py::array& array) {
  return (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
}

inline py::array contiguous_copy(const py::array& array) {
  return py::module_::import("numpy")
      .attr("array")(array, py::arg("order") = "C")
      .cast<py::array>();
}

// C-contiguous and aligned; the array itself where it is so already.
inline py::array contiguous(const py::array& array) {
  const bool c_style = (array.flags() & py::array::c_style) != 0;
  return c_style && is_aligned(array) ? array : contiguous_copy(array);
}

// As a [T, B, F] sequence over the first two axes, in whichever order; copied only where the last
// axis is not contiguous or the memory is not aligned.
template <class S>
class SequenceArray {
 public:
  SequenceArray() = default;
  SequenceArray(py::array array, bool batch_first) : array_(std::move(array)) {
    const auto usable = [this] {
      constexpr Index size = sizeof(S);
      return is_aligned(array_) && (array_.shape(2) <= 1 || array_.strides(2) == size) &&
             array_.strides(0) % size == 0 && array_.strides(1) % size == 0;
    };
    if (!usable()) array_ = contiguous_copy(array_);
    const int time = batch_first ? 1 : 0;
    view_ = {static_cast<const S*>(array_.data()), array_.strides(time) / Index(sizeof(S)),
             array_.strides(1 - time) / Index(sizeof(S))};
  }
  const py::array& array() const { return array_; }
  Sequence<const S> view() const { return view_; }

 private:
  py::array array_;
  Sequence<const S> view_;
};

// A copy, in order: what is checked or kept must not change with the caller's array.
inline py::array own_copy(const py::array& array) { return array.attr("copy")("C"); }

template <class S>
S* mutable_data(const char* name, const py::array& array) {
  const bool c_style = (array.flags() & py::array::c_style) != 0;
  if (!array.writeable() || !c_style || !is_aligned(array)) {
    throw py::value_error(std::string(name) + ": wanted a writable, aligned, C-contiguous array");
  }
  return static_cast<S*>(const_cast<void*>(array.data()));
}

// The GIL is let go of while this lives. `take_back` returns with it, or, in a thread that outlives
// the interpreter, never: Python ends such a thread where it waits, and that would unwind through
// destructors which may not throw, and through objects that are gone.
void take_back(PyThreadState* state);
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { take_back(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Lets Ctrl-C through: hands poll to a long call that has let go of the GIL.
Interrupt python_signals();

// Runs work without the GIL; an interrupt comes out as the Python exception that it is.
template <class F>
void without_gil(F&& work) {
  try {
    const WithoutGil free;
    work(python_signals());
  } catch (const Interrupted&) {
    throw py::error_already_set();
  }
}

}  // namespace fastbptt::bindings
