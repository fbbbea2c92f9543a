#include <pybind11/pybind11.h>

#include "concepts.h"

// Calls share no mutable state but the thread pool and the freed blocks, which lock; so no GIL is
// needed. A session or a stream is for one thread at a time, which Python's own classes see to.
PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  m.doc() = "The C++ core of fastbptt.";
  fastbptt::bindings::bind_runtime(m);
  fastbptt::bindings::bind_recurrent(m);
  fastbptt::bindings::bind_tensors(m);
  fastbptt::bindings::bind_readout(m);
  fastbptt::bindings::bind_random(m);
  fastbptt::bindings::bind_online(m);
}
