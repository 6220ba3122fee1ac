// setmaxnreg: the registers that the warpgroups of a cluster's blocks have at the start, give up and take.
#pragma once

namespace flash_attn::emulator {

void begin_register_files();

// By each thread of a warpgroup. Taking waits until others gave up as many.
void give_up_registers_to(int num_registers);
void take_registers_up_to(int num_registers);

}  // namespace flash_attn::emulator
