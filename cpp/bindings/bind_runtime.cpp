#include <pybind11/stl.h>

#include <chrono>

#include "arrays.h"
#include "cells.h"
#include "concepts.h"
#include "fastbptt/buffer.h"
#include "fastbptt/runtime.h"

namespace fastbptt::bindings {
namespace {

// Taking the GIL costs a switch between threads, so it is asked for a few times a second only.
constexpr std::chrono::milliseconds poll_every{100};

bool poll_signals(void*) {
  thread_local auto last = std::chrono::steady_clock::now();
  const auto now = std::chrono::steady_clock::now();
  if (now - last < poll_every) return false;
  last = now;
  py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

}  // namespace

Interrupt python_signals() { return {poll_signals, nullptr}; }

void bind_runtime(py::module_& m) {
  // Chooses the instruction set now, so that a wrong FASTBPTT_ISA fails the import.
  try {
    cpu_info();
    get_num_threads();
  } catch (const std::invalid_argument& error) {
    throw py::import_error(error.what());
  }
  m.def("cpu_info", [] {
    const CpuInfo info = cpu_info();
    py::dict result;
    result["isa"] = info.isa;
    result["available"] = info.available;
    result["built"] = info.built;
    result["vector_bytes"] = info.vector_bytes;
    return result;
  });
  m.def(
      "allocated_bytes",
      [](bool reset) {
        const Allocated bytes = allocated(reset);
        return py::make_tuple(bytes.now, bytes.most);
      },
      py::arg("reset"));
  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def("get_num_threads", &get_num_threads);
  m.def(
      "set_float32_matmul_precision",
      [](const std::string& name) { set_float32_matmul_precision(precision_of(name)); },
      py::arg("precision"));
  m.def("get_float32_matmul_precision", [] { return name_of(get_float32_matmul_precision()); });
}

}  // namespace fastbptt::bindings
