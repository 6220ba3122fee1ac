// Kernels as nvcc compiled them: their PTX, translated to C++ (build_support/ptx.py), runs in place of their source.
#pragma once

namespace flash_attn::emulator {

struct TranslatedKernel {
  void (*run_thread)(const void* const* params);  // a parameter is known by its address
  int static_smem_bytes;
};

struct Translation {
  Translation(const char* symbol, const TranslatedKernel& kernel);
};

// What was translated of the kernel at this address, or null if nothing was translated at all.
const TranslatedKernel* find_translated(const void* kernel);

}  // namespace flash_attn::emulator
