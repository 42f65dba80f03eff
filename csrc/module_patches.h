// Adds the functions for patch_covariance to the Python module pudnet._C.
#pragma once

#include <pybind11/pybind11.h>

void bind_patches(pybind11::module_& m);
