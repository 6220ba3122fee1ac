// Which kernels ran, so that a test can tell that the one it is about did.
#pragma once

namespace flash_attn::emulator {

// Called by what a launch function called to start its kernel.
void log_launch();

}  // namespace flash_attn::emulator
