#include <pybind11/pybind11.h>

#include "concepts.h"

// The kernels share no mutable state but the thread pool, which locks; so no GIL is needed.
PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  m.doc() = "The C++ core of fastbptt.";
  fastbptt::bindings::bind_runtime(m);
  fastbptt::bindings::bind_recurrent(m);
  fastbptt::bindings::bind_tensors(m);
  fastbptt::bindings::bind_readout(m);
  fastbptt::bindings::bind_random(m);
  fastbptt::bindings::bind_online(m);
}
