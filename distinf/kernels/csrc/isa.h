// Which instruction sets this process may use: CPUID, what the kernel saves, and the granted tile permission.
#pragma once
#include <string>
#include <vector>

namespace distinf {

// Ordered: each level may use everything below it.
enum class Isa { kAvx2 = 0, kAvx512 = 1, kAvx512Bf16 = 2, kAmx = 3 };

// True when the CPU has the level, the operating system saves its registers and, for AMX, granted the tiles.
bool isa_available(Isa isa);

// Brand string of the CPU as CPUID reports it; for display only, never for dispatch.
std::string cpu_name();

}  // namespace distinf
