// Activations as small whole numbers, one scale a row: what quantised weights are multiplied with.
//
// One digit: x = scale * d, |d| <= 127. Two digits: x = scale * (128 d0 + d1), 15 bits and so finer than the bf16
// that it came from; two int8 products then replace one product in a wider type that no CPU has.
#pragma once
#include <algorithm>

#include "kernel_table.h"

namespace distinf {

struct QuantisedRows {
  int8_t* digits;  // [rows][w.digits][k_padded]
  int32_t* sums;   // [rows][groups][w.digits]: of a group's digits, for its middle or offset
  float* scales;   // [rows]
  int64_t k_padded, groups;

  const int8_t* digit(const Weight& w, int64_t row, int d) const { return digits + (row * w.digits + d) * k_padded; }
  const int32_t* sum(const Weight& w, int64_t row, int64_t group) const {
    return sums + (row * groups + group) * w.digits;
  }
};

// Where the quantised rows of `copies` workers lie in scratch; bytes is the size of one copy.
inline int64_t quantised_rows_bytes(const Weight& w, int64_t rows) {
  const int64_t k_padded = w.groups() * w.group_rows();
  return round_up(rows * (w.digits * (k_padded + w.groups() * 4) + 4) + 192, 64);
}

inline QuantisedRows quantised_rows(const Weight& w, int64_t rows, char* memory) {
  QuantisedRows q;
  q.groups = w.groups();
  q.k_padded = q.groups * w.group_rows();
  q.digits = reinterpret_cast<int8_t*>(memory);
  memory += round_up(rows * w.digits * q.k_padded, 64);
  q.sums = reinterpret_cast<int32_t*>(memory);
  memory += round_up(rows * q.groups * w.digits * 4, 64);
  q.scales = reinterpret_cast<float*>(memory);
  return q;
}

// Up to this many rows every worker quantises all of them for itself: cheaper than meeting at a barrier.
constexpr int64_t kPrivateRows = 2;

// Scratch of a quantised linear over at most `rows` rows by `workers`.
inline int64_t quantised_scratch_bytes(const Weight& w, int64_t rows, int workers) {
  const int64_t copies = workers * quantised_rows_bytes(w, std::min(rows, kPrivateRows));
  return std::max(copies, quantised_rows_bytes(w, rows));
}

}  // namespace distinf
