// Sums of ranks' partial results, and the norm that takes such a sum in while it reads.

// Vector at offset i of the sum of all parts, in their order.
template <class T>
inline Vec load_sum(const Parts& parts, int64_t i, int64_t n) {
  Vec sum = load_n(static_cast<const T*>(parts.data[0]), i, n);
  for (int p = 1; p < parts.count; p++) sum = add(sum, load_n(static_cast<const T*>(parts.data[p]), i, n));
  return sum;
}

inline Vec load_sum(const Parts& parts, int64_t i, int64_t n) {
  return parts.bf16 ? load_sum<bf16>(parts, i, n) : load_sum<float>(parts, i, n);
}

void sum_parts(const Parts& parts, int64_t begin, int64_t end, void* out, bool out_bf16) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const Vec sum = load_sum(parts, i, end);
    out_bf16 ? store_n(static_cast<bf16*>(out), sum, i, end) : store_n(static_cast<float*>(out), sum, i, end);
  }
}

// Elements begin .. end of one row: x += parts (when given); the squares' sum.
inline float take_in(const RmsNormArgs& args, int64_t row, int64_t begin, int64_t end) {
  float* x = args.x + row * args.n;
  Vec squares = zero();
  for (int64_t i = begin; i < end; i += kLanes) {
    Vec v = load_n(x, i, end);
    if (args.add.count) {
      v = add(v, load_sum(args.add, row * args.n + i, row * args.n + end));
      store_n(x, v, i, end);
    }
    squares = fma(v, v, squares);
  }
  return sum(squares);
}

inline void scale_row(const RmsNormArgs& args, int64_t row, float squares, int64_t begin, int64_t end) {
  const float* x = args.x + row * args.n;
  const Vec scale = broadcast(1.0f / std::sqrt(squares / static_cast<float>(args.n) + args.eps));
  for (int64_t i = begin; i < end; i += kLanes) {
    store_n(args.out + row * args.n, mul(mul(load_n(x, i, end), scale), load_n(args.weight, i, end)), i, end);
  }
}

void rms_norm(const Worker& w, const RmsNormArgs& args) {
  if (args.rows >= w.count) {
    for (int64_t row = w.begin(args.rows); row < w.end(args.rows); row++) {
      scale_row(args, row, take_in(args, row, 0, args.n), 0, args.n);
    }
    return;
  }
  // Fewer rows than workers: a row's columns are divided, 16 (a cache line of fp32) at least to each.
  const int64_t lines = (args.n + 15) / 16;
  const int64_t begin = w.begin(lines) * 16, end = std::min(w.end(lines) * 16, args.n);
  const int64_t stride = norm_scratch_stride(w.count);
  float* mine = args.squares + w.index * stride;
  for (int64_t row = 0; row < args.rows; row++) mine[row] = take_in(args, row, begin, end);
  w.barrier();
  for (int64_t row = 0; row < args.rows; row++) {
    float squares = 0;
    for (int i = 0; i < w.count; i++) squares += args.squares[i * stride + row];
    scale_row(args, row, squares, begin, end);
  }
}
