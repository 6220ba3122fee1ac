// CuTe's tensors in registers, without the products and copies of every architecture that <cute/tensor.hpp> brings
// along: half of what a file costs before its first kernel.
#pragma once

#include <cute/algorithm/clear.hpp>
#include <cute/algorithm/fill.hpp>
#include <cute/numeric/arithmetic_tuple.hpp>
#include <cute/tensor_impl.hpp>
