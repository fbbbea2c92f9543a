#include <pybind11/stl.h>

#include <chrono>
#include <thread>
#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

#include "arrays.h"
#include "cells.h"
#include "concepts.h"
#include "fastbptt/buffer.h"
#include "fastbptt/runtime.h"

namespace fastbptt::bindings {
namespace {

// Taking the GIL costs a switch between threads, so it is asked for a few times a second only.
constexpr std::chrono::milliseconds poll_every{100};

// Waits for the GIL. At the end of the interpreter Python ends a thread that does, by an unwinding
// which a handler may see but not stop.
template <class F>
void or_never(F&& wait) {
#ifdef __GLIBCXX__
  try {
    wait();
  } catch (const abi::__forced_unwind&) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
#else
  wait();
#endif
}

bool poll_signals(void*) {
  thread_local auto last = std::chrono::steady_clock::now();
  const auto now = std::chrono::steady_clock::now();
  if (now - last < poll_every) return false;
  last = now;
  PyGILState_STATE held{};
  or_never([&] { held = PyGILState_Ensure(); });
  const bool interrupted = PyErr_CheckSignals() != 0;
  PyGILState_Release(held);
  return interrupted;
}

}  // namespace

void take_back(PyThreadState* state) {
  or_never([&] { PyEval_RestoreThread(state); });
}

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
