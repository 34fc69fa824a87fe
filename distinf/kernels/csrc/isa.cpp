#include "isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace distinf {
namespace {

// Linux hands out AMX tile state per process on request (Documentation/arch/x86/xstate.rst).
constexpr int kArchReqXcompPerm = 0x1023;
constexpr int kXfeatureXtileData = 18;

uint64_t enabled_xstate() {
  uint32_t lo, hi;
  asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

bool amx_granted() {
  uint32_t a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d >> 24 & 1, amx_bf16 = d >> 22 & 1, amx_int8 = d >> 25 & 1;
  if (!tile || !amx_bf16 || !amx_int8) return false;
  constexpr uint64_t kTileBits = 3ull << 17;  // XTILECFG and XTILEDATA
  if ((enabled_xstate() & kTileBits) != kTileBits) return false;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtileData) == 0;
}

}  // namespace

bool isa_available(Isa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::kAvx2: return avx2;
    case Isa::kAvx512: return avx512;
    case Isa::kAvx512Bf16: return avx512_bf16;
    case Isa::kAmx: {
      static const bool granted = avx512_bf16 && amx_granted();
      return granted;
    }
  }
  return false;
}

std::string cpu_name() {
  uint32_t regs[12];
  if (!__get_cpuid(0x80000002, &regs[0], &regs[1], &regs[2], &regs[3])) return "unknown";
  __get_cpuid(0x80000003, &regs[4], &regs[5], &regs[6], &regs[7]);
  __get_cpuid(0x80000004, &regs[8], &regs[9], &regs[10], &regs[11]);
  char name[49] = {};
  std::memcpy(name, regs, 48);
  return name;
}

}  // namespace distinf
