// Activations of a Vec.

inline Vec sigmoid_times(Vec x, Vec u) { return div(x, add(broadcast(1.0f), exp(sub(zero(), u)))); }

// x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): 0.5 x (1 + tanh u) without its cancellation
inline Vec gelu_tanh(Vec x) {
  const Vec cubic = fma(mul(mul(x, x), broadcast(0.044715f)), x, x);
  return sigmoid_times(x, mul(cubic, broadcast(1.59576912f)));  // 2 sqrt(2 / pi)
}

// x P(X < x) of the normal distribution: max(x, 0) - |x| erfc(|x| / sqrt 2) / 2. The complementary error function
// is t e^(polynomial(t) - z^2), t = 1 / (1 + z / 2), to within 1.2e-7 of itself (Press et al., Numerical Recipes, 6.2).
inline Vec gelu(Vec x) {
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

inline Vec activated(Act act, Vec x) {
  switch (act) {
    case Act::kNone: return x;
    case Act::kSilu: return sigmoid_times(x, x);
    case Act::kGelu: return gelu(x);
    case Act::kGeluTanh: return gelu_tanh(x);
    case Act::kRelu: return max(x, zero());
  }
  return x;
}
