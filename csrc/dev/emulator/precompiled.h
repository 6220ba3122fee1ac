// What each kernel's file starts with. build_support/emulator.py compiles it once for all of them.
#pragma once

// clang-format off: CuTe comes after what stands in for nvcc.
#include "dev/emulator/cuda_builtins.h"
#include <cute/tensor.hpp>
// clang-format on
