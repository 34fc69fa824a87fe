// SPDX-License-Identifier: Apache-2.0
//
// Runs compiled AMX code on an x86-64 CPU without AMX: catches SIGILL and emulates the instruction.
// Test support only. Semantics: Intel SDM vol. 1 ch. "Programming with Intel AMX", and the "Operation"
// and "Intel AMX Instruction Exception Classes" sections of vol. 2. Where hardware raises #UD or #GP
// because of the tile configuration, this prints one line and aborts.
//
//   g++ -O2 -std=c++17 -fPIC -shared -o amx_emulator.so amx_emulator.cpp
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

constexpr int kTiles = 8, kMaxRows = 16, kRowBytes = 64, kDwords = kRowBytes / 4;

struct TileState {
  uint8_t config[64];  // LDTILECFG layout; palette 0 means "not configured"
  uint8_t tile[kTiles][kMaxRows][kRowBytes];

  int palette() const { return config[0]; }
  int start_row() const { return config[1]; }
  void zero_start_row() { config[1] = 0; }
  int colsb(int t) const { return config[16 + 2 * t] | config[17 + 2 * t] << 8; }
  int rows(int t) const { return config[48 + t]; }
};

std::atomic<unsigned long> emulated{0};
struct sigaction previous;

void require(bool ok, const char* insn, const char* why) {
  if (ok) return;
  char line[200];
  size_t n = 0;
  for (const char* part : {"amx_emulator: ", insn, ": ", why, "\n"})
    while (*part && n < sizeof line) line[n++] = *part++;
  (void)!write(STDERR_FILENO, line, n);  // stdio is not async-signal-safe
  abort();
}

// Only a pointer is thread-local: initial-exec TLS of a dlopen()ed library comes from a small reserve,
// and the other TLS models may call malloc. The mapping lives as long as the process.
thread_local TileState* thread_state __attribute__((tls_model("initial-exec"))) = nullptr;

TileState& state() {
  if (!thread_state) {
    void* p = mmap(nullptr, sizeof(TileState), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(p != MAP_FAILED, "tile state", "mmap failed");
    thread_state = static_cast<TileState*>(p);
  }
  return *thread_state;
}

// ---- Instruction decoding (SDM vol. 2, "Instruction Format") ----

enum Prefix { kNone, k66, kF3, kF2 };  // VEX.pp

struct Insn {
  int opcode, pp, vvvv, mod, reg, rm;  // register numbers with their VEX extension bit
  bool sib;
  uint64_t address, stride;  // stride: the scaled index register, 0 without one
  int length;
};

constexpr int kGreg[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                           REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// `p` is just after ModRM; ext_x and ext_b are 8 when VEX.X and VEX.B extend a register number.
const uint8_t* decode_memory(const uint8_t* p, const greg_t* regs, int ext_x, int ext_b, Insn* out) {
  int base = out->rm;
  out->sib = (base & 7) == 4;
  if (out->sib) {
    const uint8_t sib = *p++;
    const int index = (sib >> 3 & 7) | ext_x;
    if (index != 4) out->stride = static_cast<uint64_t>(regs[kGreg[index]]) << (sib >> 6);
    base = (sib & 7) | ext_b;
  }
  const bool no_base = out->mod == 0 && (base & 7) == 5;
  if (!no_base) out->address = static_cast<uint64_t>(regs[kGreg[base]]);
  if (out->mod == 1) out->address += static_cast<int8_t>(*p++);
  if (out->mod == 2 || no_base) {
    int32_t disp;
    memcpy(&disp, p, sizeof disp);
    p += sizeof disp;
    out->address += disp;
  }
  if (no_base && !out->sib) out->address += reinterpret_cast<uint64_t>(p);  // relative to the next RIP
  return p;
}

// Accepts only 3-byte VEX, map 0F38, W0, 128 bit: the form of every instruction emulated here.
// Reads no byte past the instruction, which may end at the end of a page.
bool decode(const uint8_t* code, const greg_t* regs, Insn* out) {
  if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84) != 0) return false;
  if (code[3] != 0x49 && code[3] != 0x4B && code[3] != 0x5C && code[3] != 0x5E) return false;
  const int ext_r = code[1] & 0x80 ? 0 : 8, ext_x = code[1] & 0x40 ? 0 : 8, ext_b = code[1] & 0x20 ? 0 : 8;
  *out = Insn{};
  out->opcode = code[3];
  out->pp = code[2] & 3;
  out->vvvv = ~(code[2] >> 3) & 15;
  out->mod = code[4] >> 6;
  out->reg = (code[4] >> 3 & 7) | ext_r;
  out->rm = (code[4] & 7) | ext_b;
  const uint8_t* end = code + 5;
  if (out->mod != 3) end = decode_memory(end, regs, ext_x, ext_b, out);
  out->length = static_cast<int>(end - code);
  return true;
}

// ---- Configuration and data movement ----

void load_config(TileState& s, const Insn& in) {
  const char* name = "LDTILECFG";
  TileState next{};  // also zeroes all tile data
  memcpy(next.config, reinterpret_cast<const void*>(in.address), sizeof next.config);
  if (next.palette() == 0) next = TileState{};
  require(next.palette() <= 1, name, "palette is not 0 or 1");
  for (int i = 2; i < 64; ++i) {
    const bool reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
    require(!reserved || next.config[i] == 0, name, "a reserved byte is not 0");
  }
  for (int t = 0; t < kTiles; ++t) {
    require(next.rows(t) <= kMaxRows, name, "rows > 16");
    require(next.colsb(t) <= kRowBytes, name, "colsb > 64");
    require((next.rows(t) == 0) == (next.colsb(t) == 0), name, "only one of rows and colsb is 0");
  }
  s = next;
}

void store_config(const TileState& s, const Insn& in) {  // STTILECFG
  memcpy(reinterpret_cast<void*>(in.address), s.config, sizeof s.config);
}

void check_tile(const TileState& s, const char* name, int t) {  // common to classes AMX-E3, E4 and E5
  require(s.palette() != 0, name, "tiles are not configured");
  require(s.rows(t) != 0, name, "tile has rows = colsb = 0");
  require(s.colsb(t) % 4 == 0, name, "colsb is not a multiple of 4");  // TILEZERO alone would allow it
}

void write_row_and_zero(TileState& s, int t, int row, const void* data) {
  memcpy(s.tile[t][row], data, s.colsb(t));
  memset(s.tile[t][row] + s.colsb(t), 0, kRowBytes - s.colsb(t));
}

void zero_upper_rows(TileState& s, int t) {
  for (int row = s.rows(t); row < kMaxRows; ++row) memset(s.tile[t][row], 0, kRowBytes);
}

void tile_zero(TileState& s, int t) {
  check_tile(s, "TILEZERO", t);
  memset(s.tile[t], 0, sizeof s.tile[t]);
  s.zero_start_row();
}

void tile_move(TileState& s, const Insn& in, const char* name, bool load) {
  const int t = in.reg;
  check_tile(s, name, t);
  require(s.start_row() < s.rows(t), name, "start_row >= rows");
  for (int row = s.start_row(); row < s.rows(t); ++row) {
    void* memory = reinterpret_cast<void*>(in.address + row * in.stride);  // wraps: stride may be negative
    if (load) {
      write_row_and_zero(s, t, row, memory);
    } else {
      memcpy(memory, s.tile[t][row], s.colsb(t));
    }
  }
  if (load) zero_upper_rows(s, t);
  s.zero_start_row();
}

// ---- Dot products: C (m x n) += A (m x k) * B (k x n), where n and k count dwords ----
// Loops over n always cover the whole row: what they compute past colsb is not written back.

void check_dot(const TileState& s, const char* name, int c, int a, int b) {  // class AMX-E4
  require(c != a && a != b && c != b, name, "the three tiles are not distinct");
  for (int t : {c, a, b}) check_tile(s, name, t);
  require(s.colsb(c) == s.colsb(b), name, "C.colsb != B.colsb");
  require(s.rows(c) == s.rows(a), name, "C.rows != A.rows");
  require(s.colsb(a) / 4 == s.rows(b), name, "A.colsb/4 != B.rows");
}

void to_float(const uint8_t* row, float* even, float* odd) {  // a row of bf16 pairs
  uint32_t pair[kDwords], low[kDwords], high[kDwords];
  memcpy(pair, row, kRowBytes);
  for (int n = 0; n < kDwords; ++n) low[n] = pair[n] << 16;
  for (int n = 0; n < kDwords; ++n) high[n] = pair[n] & 0xFFFF0000u;
  memcpy(even, low, kRowBytes);
  memcpy(odd, high, kRowBytes);
}

// The SDM asks for a fused multiply-add. A bf16 product is exact in double, and rounding the double sum
// to float equals one rounding (53 >= 2 * 24 + 2 bits), so this needs no FMA instruction.
// noinline: no floating point operation may move above the caller's write of MXCSR.
__attribute__((noinline)) void dot_bf16(TileState& s, int c, int a, int b) {
  float b_even[kMaxRows][kDwords], b_odd[kMaxRows][kDwords], a_even[kDwords], a_odd[kDwords], sum[kDwords];
  for (int k = 0; k < s.rows(b); ++k) to_float(s.tile[b][k], b_even[k], b_odd[k]);
  for (int m = 0; m < s.rows(c); ++m) {
    float even[kDwords] = {}, odd[kDwords] = {};
    to_float(s.tile[a][m], a_even, a_odd);
    for (int k = 0; k < s.rows(b); ++k) {
      const double x = a_even[k], y = a_odd[k];
      for (int n = 0; n < kDwords; ++n) even[n] = static_cast<float>(even[n] + x * b_even[k][n]);
      for (int n = 0; n < kDwords; ++n) odd[n] = static_cast<float>(odd[n] + y * b_odd[k][n]);
    }
    memcpy(sum, s.tile[c][m], kRowBytes);
    for (int n = 0; n < kDwords; ++n) sum[n] += even[n] + odd[n];
    write_row_and_zero(s, c, m, sum);
  }
}

template <typename A, typename B>  // int8_t or uint8_t each
void dot_int8(TileState& s, int c, int a, int b) {
  int16_t b_wide[kMaxRows * 4][kDwords];  // int16: SSE2 multiplies those
  for (int k = 0; k < s.rows(b); ++k)
    for (int i = 0; i < kRowBytes; ++i) b_wide[4 * k + i % 4][i / 4] = static_cast<B>(s.tile[b][k][i]);
  for (int m = 0; m < s.rows(c); ++m) {
    uint32_t sum[kDwords];  // unsigned: the sum wraps, it does not saturate
    memcpy(sum, s.tile[c][m], kRowBytes);
    for (int k = 0; k < s.colsb(a); ++k) {
      const int16_t x = static_cast<A>(s.tile[a][m][k]);
      for (int n = 0; n < kDwords; ++n) sum[n] += static_cast<uint32_t>(x * b_wide[k][n]);
    }
    write_row_and_zero(s, c, m, sum);
  }
}

void tile_dot(TileState& s, const Insn& in, const char* name, void (*dot)(TileState&, int, int, int)) {
  check_dot(s, name, in.reg, in.rm, in.vvvv);
  _mm_setcsr(0x9FC0);  // DAZ, FTZ, nearest even, all masked; sigreturn restores the thread's MXCSR
  dot(s, in.reg, in.rm, in.vvvv);
  zero_upper_rows(s, in.reg);
  s.zero_start_row();
}

// ---- Dispatch ----

constexpr int key(bool memory, int opcode, int pp) { return memory << 10 | opcode << 2 | pp; }

bool valid_encoding(const Insn& in, bool memory) {
  if (in.reg >= kTiles || in.vvvv >= kTiles || (!memory && in.rm >= kTiles)) return false;
  if (in.opcode == 0x4B) return in.sib && in.vvvv == 0;  // tile moves must use SIB addressing
  if (in.opcode == 0x49) return in.vvvv == 0 && (memory || in.rm == 0) && (in.reg == 0 || in.pp == kF2);
  return true;
}

bool execute(const Insn& in) {
  const bool memory = in.mod != 3;
  if (!valid_encoding(in, memory)) return false;
  TileState& s = state();
  switch (key(memory, in.opcode, in.pp)) {
    case key(true, 0x49, kNone): load_config(s, in); return true;
    case key(true, 0x49, k66): store_config(s, in); return true;
    case key(true, 0x4B, kF2): tile_move(s, in, "TILELOADD", true); return true;
    case key(true, 0x4B, k66): tile_move(s, in, "TILELOADDT1", true); return true;
    case key(true, 0x4B, kF3): tile_move(s, in, "TILESTORED", false); return true;
    case key(false, 0x49, kNone): s = TileState{}; return true;  // TILERELEASE
    case key(false, 0x49, kF2): tile_zero(s, in.reg); return true;
    case key(false, 0x5C, kF3): tile_dot(s, in, "TDPBF16PS", dot_bf16); return true;
    case key(false, 0x5E, kF2): tile_dot(s, in, "TDPBSSD", dot_int8<int8_t, int8_t>); return true;
    case key(false, 0x5E, kF3): tile_dot(s, in, "TDPBSUD", dot_int8<int8_t, uint8_t>); return true;
    case key(false, 0x5E, k66): tile_dot(s, in, "TDPBUSD", dot_int8<uint8_t, int8_t>); return true;
    case key(false, 0x5E, kNone): tile_dot(s, in, "TDPBUUD", dot_int8<uint8_t, uint8_t>); return true;
    default: return false;
  }
}

bool step(greg_t* regs) {
  Insn in;
  if (!decode(reinterpret_cast<const uint8_t*>(regs[REG_RIP]), regs, &in) || !execute(in)) return false;
  regs[REG_RIP] += in.length;
  emulated.fetch_add(1, std::memory_order_relaxed);
  return true;
}

void call_previous(int sig, siginfo_t* info, void* context) {
  if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(sig, info, context);
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(sig);
  signal(sig, SIG_DFL);                // on return the instruction runs again and kills the process where it stands
  if (info->si_code <= 0) raise(sig);  // sent by kill() or raise(): there is no instruction to run again
}

void on_sigill(int sig, siginfo_t* info, void* context) {
  greg_t* regs = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  if (info->si_code <= 0 || !step(regs)) return call_previous(sig, info, context);
  while (step(regs)) {  // a signal costs more than an instruction: run all that follow directly
  }
}

}  // namespace

// Call before the first AMX instruction, after everything else that handles SIGILL.
// Returns 0, or -1 with errno set.
extern "C" int amx_emulator_install(void) {
  struct sigaction action = {}, old = {};
  action.sa_sigaction = on_sigill;
  action.sa_flags = SA_SIGINFO;  // no SA_NODEFER: a SIGILL in the handler itself must kill, not recurse
  if (sigaction(SIGILL, &action, &old) != 0) return -1;
  if (old.sa_sigaction != on_sigill) previous = old;  // a second call must not make it chain to itself
  return 0;
}

// Instructions emulated so far, by all threads.
extern "C" unsigned long amx_emulator_count(void) { return emulated.load(); }
