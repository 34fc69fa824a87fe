// SPDX-License-Identifier: Apache-2.0
//
// AMX code for test_amx_emulator.py, built as a shared object and called through ctypes.
#include <immintrin.h>

#include <cstdint>

#define AMX __attribute__((target("amx-tile,amx-bf16,amx-int8")))

namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved_a[14] = {};
  uint16_t colsb[8] = {}, reserved_b[8] = {};
  uint8_t rows[8] = {}, reserved_c[8] = {};
  void set(int tile, int tile_rows, int dwords) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    colsb[tile] = static_cast<uint16_t>(4 * dwords);
  }
};

AMX void load_config(const void* config) {
  // The intrinsic declares only 8 bytes as its input: without this, stores to the rest may be dropped.
  asm volatile("" ::"r"(config) : "memory");
  _tile_loadconfig(config);
}

AMX void dot(int kind) {
  switch (kind) {
    case 0: _tile_dpbf16ps(0, 6, 7); break;
    case 1: _tile_dpbssd(0, 6, 7); break;
    case 2: _tile_dpbsud(0, 6, 7); break;
    case 3: _tile_dpbusd(0, 6, 7); break;
    default: _tile_dpbuud(0, 6, 7); break;
  }
}

// One block: C (m x n dwords) += A (m x k dwords) * B (k x n dwords). 7 AMX instructions.
AMX void block(int kind, const char* a, const char* b, char* c, int m, int n, int k, long lda, long ldb, long ldc) {
  Config config;
  config.set(0, m, n);
  config.set(6, m, k);
  config.set(7, k, n);
  load_config(&config);
  _tile_loadd(0, c, ldc);
  _tile_loadd(6, a, lda);
  _tile_stream_loadd(7, b, ldb);
  dot(kind);
  _tile_stored(0, c, ldc);
  _tile_release();
}

int block_size(int total, int from) { return total - from < 16 ? total - from : 16; }

}  // namespace

// Any m, n, k (in dwords; strides in bytes), edge blocks included. Returns whether MXCSR survived.
extern "C" bool probe_gemm(int kind, const char* a, const char* b, char* c, int m, int n, int k, long lda, long ldb,
                           long ldc) {
  const unsigned mxcsr = _mm_getcsr();
  for (int i = 0; i < m; i += 16)
    for (int j = 0; j < n; j += 16)
      for (int p = 0; p < k; p += 16)
        block(kind, a + i * lda + 4 * p, b + p * ldb + 4 * j, c + i * ldc + 4 * j, block_size(m, i), block_size(n, j),
              block_size(k, p), lda, ldb, ldc);
  return _mm_getcsr() == mxcsr;
}

// Configures the tiles, then multiplies: for configurations that must be refused.
extern "C" AMX void probe_dot(const void* config) {
  load_config(config);
  dot(0);
}

// Dumps what STTILECFG says with the tiles configured (out[0]) and after TILERELEASE (out[1]).
// Static objects named in the asm make the operands RIP-relative.
extern "C" AMX void probe_config(Config* out) {
  static Config config, dump;
  config.set(3, 5, 7);
  asm volatile("ldtilecfg %1\n sttilecfg %0" : "=m"(dump) : "m"(config));
  out[0] = dump;
  asm volatile("tilerelease\n sttilecfg %0" : "=m"(dump));
  out[1] = dump;
}

#define LOAD_FORM(operand)                                                                            \
  asm volatile("mov %0, %%r13\n mov %1, %%r12\n tileloadd " operand ", %%tmm1" ::"r"(base), "r"(step) \
               : "r12", "r13", "memory")

// Loads 4 rows of 8 bytes through one addressing form and stores them.
extern "C" AMX void probe_address(int form, const char* base, long step, char* out) {
  Config config;
  config.set(1, 4, 2);
  if (form == 5) config.start_row = 3;
  load_config(&config);
  switch (form) {
    case 0: LOAD_FORM("(%%r13,%%r12,1)"); break;
    case 1: LOAD_FORM("-40(%%r13,%%r12,2)"); break;
    case 2: LOAD_FORM("1000(%%r13,%%r12,8)"); break;
    case 3: LOAD_FORM("16(%%r13)"); break;  // no index: stride 0
    case 4: asm volatile("tileloadd 8(%0,%1,4), %%tmm1" ::"a"(base), "c"(step) : "memory"); break;
    case 5: asm volatile("tileloadd 8(,%0,1), %%tmm1" ::"r"(step) : "memory"); break;  // no base, row 3 only
    default:
      LOAD_FORM("(%%r13,%%r12,1)");
      _tile_zero(1);
      break;
  }
  _tile_stored(1, out, 8);
  _tile_release();
}

extern "C" void probe_ud2() { asm volatile("ud2"); }
