#pragma once
#include <pybind11/pybind11.h>

#include "runtime.h"

// Adds the operations of mixtures of experts to the Runtime class.
void bind_moe(pybind11::class_<distinf::Runtime>& runtime);
