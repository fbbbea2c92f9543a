// One function a concept; module.cpp calls them in order.
#pragma once
#include <pybind11/pybind11.h>

namespace fastbptt::bindings {

void bind_runtime(pybind11::module_& m);
void bind_recurrent(pybind11::module_& m);
void bind_tensors(pybind11::module_& m);
void bind_readout(pybind11::module_& m);
void bind_random(pybind11::module_& m);
void bind_online(pybind11::module_& m);

}  // namespace fastbptt::bindings
