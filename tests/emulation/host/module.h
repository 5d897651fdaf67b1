// The topics of the extension module: what each source beside module.cpp adds to it.
#pragma once
#include <pybind11/pybind11.h>

// Weak: the module has those topics whose sources it is made of.
#define RK_TOPIC __attribute__((weak))

RK_TOPIC void bind_samples(pybind11::module_& m);
RK_TOPIC void bind_kernels(pybind11::module_& m);
