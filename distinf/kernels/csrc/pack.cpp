#include "pack.h"

#include <cstring>

namespace distinf {
namespace {

inline bf16 as_bf16(float x) { return to_bf16(x); }
inline bf16 as_bf16(bf16 x) { return x; }

}  // namespace

template <class T>
void pack_bf16(const Worker& w, const T* src, int64_t stride, bf16* dst, int64_t n, int64_t k) {
  const int64_t panels = round_up(n, kPanel) / kPanel, k_padded = round_up(k, kDepth);
  for (int64_t panel = w.begin(panels); panel < w.end(panels); panel++) {
    bf16* to = dst + panel * kPanel * k_padded;
    std::memset(to, 0, kPanel * k_padded * sizeof(bf16));
    for (int64_t c = 0; c < kPanel && panel * kPanel + c < n; c++) {
      const T* from = src + (panel * kPanel + c) * stride;
      for (int64_t i = 0; i < k; i++) to[(i / 2 * kPanel + c) * 2 + i % 2] = as_bf16(from[i]);
    }
  }
}

template void pack_bf16<float>(const Worker&, const float*, int64_t, bf16*, int64_t, int64_t);
template void pack_bf16<bf16>(const Worker&, const bf16*, int64_t, bf16*, int64_t, int64_t);

uint64_t read_stream(const Worker& w, const void* data, int64_t bytes) {
  // 4-8 KiB ahead is where one core's read rate peaks on the machines measured (perf/LOG.md).
  constexpr int64_t kAhead = 6144;
  const int64_t lines = bytes / 64;
  const char* p = static_cast<const char*>(data);
  uint64_t sum[4] = {};
  for (int64_t line = w.begin(lines); line < w.end(lines); line++) {
    const char* at = p + line * 64;
    __builtin_prefetch(at + kAhead, 0, 2);
    uint64_t words[8];
    std::memcpy(words, at, 64);
    for (int i = 0; i < 4; i++) sum[i] += words[i] ^ words[i + 4];
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

}  // namespace distinf
