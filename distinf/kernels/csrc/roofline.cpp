#include "roofline.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>

namespace distinf {
namespace {

double seconds(ThreadTeam& team, const Op& op) {
  const auto start = std::chrono::steady_clock::now();
  team.run(op);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// From the kernel, in bytes; 0 where it does not say. glibc's sysconf multiplies it by threads on some CPUs.
int64_t last_level_cache_bytes() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");  // "32768K"
  int64_t kib = 0;
  file >> kib;
  return kib << 10;
}

}  // namespace

ReadProbe::ReadProbe(Runtime& rt)
    : rt_(rt),
      bytes_(std::max<int64_t>(256 << 20, 4 * last_level_cache_bytes())),
      data_(static_cast<char*>(arena_.allocate(bytes_))),
      sinks_(rt.team.size() * 8) {
  rt_.team.run([this](const Worker& w) {  // ones: a page of zeros might not be a page of its own
    const int64_t lines = bytes_ / 64;
    std::memset(data_ + w.begin(lines) * 64, 1, (w.end(lines) - w.begin(lines)) * 64);
  });
}

double ReadProbe::read_s(bool prefetch) {
  return seconds(rt_.team,
                 [=](const Worker& w) { sinks_[w.index * 8] += rt_.kernels.read_stream(w, data_, bytes_, prefetch); });
}

double peak_tops(Runtime& rt, bool int8, int repeats) {
  const auto kernel = int8 ? rt.kernels.peak_int8 : rt.kernels.peak_bf16;
  constexpr int64_t kIterations = 200000;  // tens of milliseconds: far above the cost of starting the team
  std::vector<float> sinks(rt.team.size() * 16);
  std::vector<double> flops(rt.team.size() * 8);
  double best = 0;
  for (int i = 0; i < repeats; i++) {
    const double s =
        seconds(rt.team, [&](const Worker& w) { flops[w.index * 8] = kernel(kIterations, &sinks[w.index * 16]); });
    double total = 0;
    for (double f : flops) total += f;
    best = std::max(best, total / s / 1e12);
  }
  return best;
}

}  // namespace distinf
