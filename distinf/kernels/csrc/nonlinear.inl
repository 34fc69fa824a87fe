// Activations, gated or not, the soft cap, and sums into the residual stream.

inline Vec sigmoid_times(Vec x, Vec u) { return div(x, add(broadcast(1.0f), exp(sub(zero(), u)))); }

struct Silu {
  static Vec of(Vec x) { return sigmoid_times(x, x); }
};

// x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): 0.5 x (1 + tanh u) without its cancellation
struct GeluTanh {
  static Vec of(Vec x) {
    const Vec cubic = fma(mul(mul(x, x), broadcast(0.044715f)), x, x);
    return sigmoid_times(x, mul(cubic, broadcast(1.59576912f)));  // 2 sqrt(2 / pi)
  }
};

// x P(X < x) of the normal distribution: max(x, 0) - |x| erfc(|x| / sqrt 2) / 2. The complementary error function
// is t e^(polynomial(t) - z^2), t = 1 / (1 + z / 2), to within 1.2e-7 of itself (Press et al., Numerical Recipes, 6.2).
struct Gelu {
  static Vec of(Vec x) {
    const Vec size = max(x, sub(zero(), x)), z = mul(size, broadcast(0.707106781f));
    const Vec t = div(broadcast(1.0f), fma(z, broadcast(0.5f), broadcast(1.0f)));
    Vec p = broadcast(0.17087277f);
    for (const float c : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f,
                          1.00002368f, -1.26551223f}) {
      p = fma(p, t, broadcast(c));
    }
    const Vec beyond = mul(t, exp(sub(p, mul(z, z))));
    return sub(max(x, zero()), mul(mul(size, broadcast(0.5f)), beyond));
  }
};

struct Relu {
  static Vec of(Vec x) { return max(x, zero()); }
};

// Whole vectors of n elements for each worker, so that only the last one meets the end of the row.
template <class Use>
inline void each_vector(const Worker& w, int64_t n, Use use) {
  const int64_t vectors = (n + kLanes - 1) / kLanes;
  for (int64_t i = w.begin(vectors) * kLanes; i < std::min(w.end(vectors) * kLanes, n); i += kLanes) use(i);
}

template <class F>
inline void activate(const Worker& w, const bf16* x, bf16* out, int64_t rows, int64_t n, bool gated) {
  for (int64_t row = 0; row < rows; row++) {
    const bf16* from = x + row * (gated ? 2 * n : n);
    each_vector(w, n, [&](int64_t i) {
      const Vec y = F::of(load_n(from, i, n));
      store_n(out + row * n, gated ? mul(y, load_n(from + n, i, n)) : y, i, n);
    });
  }
}

void act(const Worker& w, Act kind, const bf16* x, bf16* out, int64_t rows, int64_t n, bool gated) {
  switch (kind) {
    case Act::kSilu: return activate<Silu>(w, x, out, rows, n, gated);
    case Act::kGelu: return activate<Gelu>(w, x, out, rows, n, gated);
    case Act::kGeluTanh: return activate<GeluTanh>(w, x, out, rows, n, gated);
    case Act::kRelu: return activate<Relu>(w, x, out, rows, n, gated);
  }
}

void softcap(const Worker& w, float* x, int64_t n, float cap) {
  each_vector(w, n, [&](int64_t i) { store_n(x, soft_capped(load_n(x, i, n), cap), i, n); });
}

template <class T>
inline void add_to(const Worker& w, float* x, const T* y, int64_t n) {
  each_vector(w, n, [&](int64_t i) { store_n(x, add(load_n(x, i, n), load_n(y, i, n)), i, n); });
}

void add_rows(const Worker& w, float* x, const void* y, bool fp32, int64_t n) {
  fp32 ? add_to(w, x, static_cast<const float*>(y), n) : add_to(w, x, static_cast<const bf16*>(y), n);
}
