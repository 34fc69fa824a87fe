// Norms of rows, which take a sum of ranks' partial results in while they read, and of single heads in place.

// Vector at offset i of a row of x, after x += parts (when given).
inline Vec take_in(const NormArgs& args, int64_t row, int64_t i, int64_t end) {
  float* x = args.x + row * args.n;
  Vec v = load_n(x, i, end);
  if (args.add.count) {
    v = add(v, load_sum(args.add, row * args.n + i, row * args.n + end));
    store_n(x, v, i, end);
  }
  return v;
}

struct RmsNorm {
  using Part = float;  // sum of the squares

  static Part read(const NormArgs& args, int64_t row, int64_t begin, int64_t end) {
    Vec squares = zero();
    for (int64_t i = begin; i < end; i += kLanes) {
      const Vec v = take_in(args, row, i, end);
      squares = fma(v, v, squares);
    }
    return sum(squares);
  }

  static void join(Part& total, Part part) { total += part; }

  static void write(const NormArgs& args, int64_t row, Part squares, int64_t begin, int64_t end) {
    const float* x = args.x + row * args.n;
    const Vec scale = broadcast(1.0f / std::sqrt(squares / static_cast<float>(args.n) + args.eps));
    for (int64_t i = begin; i < end; i += kLanes) {
      store_n(args.out + row * args.n, mul(mul(load_n(x, i, end), scale), load_n(args.weight, i, end)), i, end);
    }
  }
};

struct LayerNorm {
  struct Part {
    float count, mean;
    float squares;  // sum of the squared distances from the mean
  };

  // The squares in a pass of their own: the mean of squares less the square of the mean cancels.
  static Part read(const NormArgs& args, int64_t row, int64_t begin, int64_t end) {
    Vec total = zero();
    for (int64_t i = begin; i < end; i += kLanes) total = add(total, take_in(args, row, i, end));
    const float count = static_cast<float>(end - begin), mean = sum(total) / count;
    const float* x = args.x + row * args.n;
    Vec squares = zero();
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const Vec v = sub(load(x + i), broadcast(mean));
      squares = fma(v, v, squares);
    }
    float rest = 0;
    for (; i < end; i++) rest += (x[i] - mean) * (x[i] - mean);
    return {count, mean, sum(squares) + rest};
  }

  // Chan, Golub and LeVeque, The American Statistician 37(3), 1983, equation 2.1
  static void join(Part& total, const Part& part) {
    const float count = total.count + part.count, apart = part.mean - total.mean;
    total.squares += part.squares + apart * apart * (total.count * part.count / count);
    total.mean += apart * (part.count / count);
    total.count = count;
  }

  static void write(const NormArgs& args, int64_t row, const Part& all, int64_t begin, int64_t end) {
    const float* x = args.x + row * args.n;
    const Vec mean = broadcast(all.mean);
    const Vec scale = broadcast(1.0f / std::sqrt(all.squares / static_cast<float>(args.n) + args.eps));
    for (int64_t i = begin; i < end; i += kLanes) {
      const Vec centred = mul(sub(load_n(x, i, end), mean), scale);
      store_n(args.out + row * args.n, fma(centred, load_n(args.weight, i, end), load_n(args.bias, i, end)), i, end);
    }
  }
};

template <class Norm>
inline void norm_rows(const Worker& w, const NormArgs& args) {
  using Part = typename Norm::Part;
  static_assert(sizeof(Part) <= 3 * sizeof(float), "norm_scratch_stride");
  const int64_t pieces = norm_pieces(args.n);
  const auto start = [&](int64_t piece) { return std::min(piece * kNormPiece, args.n); };
  const auto read = [&](int64_t row, int64_t piece) { return Norm::read(args, row, start(piece), start(piece + 1)); };
  if (args.rows >= w.count) {
    for (int64_t row = w.begin(args.rows); row < w.end(args.rows); row++) {
      Part all{};
      for (int64_t piece = 0; piece < pieces; piece++) Norm::join(all, read(row, piece));
      Norm::write(args, row, all, 0, args.n);
    }
    return;
  }
  // Fewer rows than workers: a row's pieces are divided.
  const auto parts = [&](const Worker& of, int64_t row, int64_t piece) -> Part& {
    auto* theirs = reinterpret_cast<Part*>(args.scratch + of.index * norm_scratch_stride(w.count, args.n));
    return theirs[row * ((pieces + w.count - 1) / w.count) + piece - of.begin(pieces)];
  };
  for (int64_t row = 0; row < args.rows; row++) {
    for (int64_t piece = w.begin(pieces); piece < w.end(pieces); piece++) parts(w, row, piece) = read(row, piece);
  }
  w.barrier();
  for (int64_t row = 0; row < args.rows; row++) {
    Part all{};
    for (Worker of{0, w.count, nullptr}; of.index < w.count; of.index++) {
      for (int64_t piece = of.begin(pieces); piece < of.end(pieces); piece++) Norm::join(all, parts(of, row, piece));
    }
    Norm::write(args, row, all, start(w.begin(pieces)), start(w.end(pieces)));
  }
}

void rms_norm(const Worker& w, const NormArgs& args) { norm_rows<RmsNorm>(w, args); }

void layer_norm(const Worker& w, const NormArgs& args) { norm_rows<LayerNorm>(w, args); }

// Each of heads [rows, heads, head_dim], rows `stride` apart, becomes itself / rms * weight.
void head_norm(const Worker& w, bf16* x, int64_t stride, const float* weight, int64_t rows, int64_t heads,
               int64_t head_dim, float eps) {
  for (int64_t i = w.begin(rows * heads); i < w.end(rows * heads); i++) {
    bf16* head = x + i / heads * stride + i % heads * head_dim;
    Vec squares = zero();
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const Vec v = load_n(head, d, head_dim);
      squares = fma(v, v, squares);
    }
    const Vec scale = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(head_dim) + eps));
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      store_n(head, mul(mul(load_n(head, d, head_dim), scale), load_n(weight, d, head_dim)), d, head_dim);
    }
  }
}
