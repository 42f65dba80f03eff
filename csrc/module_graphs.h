// Adds the functions for graphs to the Python module pudnet._C.
#pragma once

#include <pybind11/pybind11.h>

void bind_graphs(pybind11::module_& m);
