// The exact GELU, for the other X_kernel.h files, after vectors.h; see instruction_set.h.

// erf by a rational function, fitted by iterated least squares to 2e-8 on |x| < 3.95, beyond which a float32 is 1.
template <typename V>
inline V gelu(V x) {
  const V most = V{} + 3.95f, least = V{} - 3.95f;
  V z = x * 0.70710678118654752f;
  z = z < most ? z : most;
  z = z > least ? z : least;
  const V y = z * z;
  V p = 2.02592277e-06f * y + 2.84677867e-04f;
  p = p * y + 3.80785354e-03f;
  p = p * y + 5.28744900e-02f;
  p = p * y + 1.91543563e-01f;
  p = p * y + 1.12837914e+00f;
  V q = 3.78314346e-05f * y + 1.17064549e-03f;
  q = q * y + 1.50544765e-02f;
  q = q * y + 1.14556776e-01f;
  q = q * y + 5.03083740e-01f;
  q = q * y + 1.0f;
  return 0.5f * x * (1.0f + z * p / q);
}

void gelu_in_place(float* values, std::int64_t count) {
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(values + j, gelu(load(values + j)));
  for (; j < count; ++j) values[j] = gelu(values[j]);
}
