// Adds embed_images to the Python module pudnet._C.
#pragma once

#include <pybind11/pybind11.h>

void bind_embedding(pybind11::module_& m);
