// Norms besides rms_norm: of whole rows with a mean and a bias, and of single heads in place.

// x[rows, n] += add (when given), then out = (x - mean) / sqrt(variance + eps) * weight + bias
void layer_norm(const Worker& w, float* x, const float* add_rows, const float* weight, const float* bias, bf16* out,
                int64_t rows, int64_t n, float eps) {
  for (int64_t row = w.begin(rows); row < w.end(rows); row++) {
    float* xr = x + row * n;
    Vec total = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
      Vec v = load_n(xr, i, n);
      if (add_rows) {
        v = add(v, load_n(add_rows + row * n, i, n));
        store_n(xr, v, i, n);
      }
      total = add(total, v);
    }
    const float mean_of_row = sum(total) / static_cast<float>(n);
    const Vec mean = broadcast(mean_of_row);
    // The variance in a pass of its own: the mean of squares less the square of the mean cancels.
    Vec squares = zero();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const Vec v = sub(load(xr + i), mean);
      squares = fma(v, v, squares);
    }
    float rest = 0;
    for (; i < n; i++) rest += (xr[i] - mean_of_row) * (xr[i] - mean_of_row);
    const Vec scale = broadcast(1.0f / std::sqrt((sum(squares) + rest) / static_cast<float>(n) + eps));
    for (i = 0; i < n; i += kLanes) {
      const Vec centred = mul(sub(load_n(xr, i, n), mean), scale);
      store_n(out + row * n, fma(centred, load_n(weight, i, n), load_n(bias, i, n)), i, n);
    }
  }
}

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
