#pragma once
#include <pybind11/pybind11.h>

namespace distinf {

void bind_all_reduce(pybind11::module_& m);

}  // namespace distinf
