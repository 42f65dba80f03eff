// Vectors of PUDNET_LANES floats, for the X_kernel.h files (instruction_set.h): included into their namespaces, again and
// again, so without an include guard.

constexpr int kLanes = PUDNET_LANES;

typedef float Floats __attribute__((vector_size(4 * PUDNET_LANES)));
typedef float LooseFloats __attribute__((vector_size(4 * PUDNET_LANES), aligned(4), may_alias));
typedef std::uint32_t Words __attribute__((vector_size(4 * PUDNET_LANES)));

inline Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<LooseFloats*>(to) = value; }

// Halves are added to halves.
inline float sum(Floats value) {
  typedef float Four __attribute__((vector_size(16)));
#if PUDNET_LANES == 16
  typedef float Eight __attribute__((vector_size(32)));
  const Eight eight = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
#elif PUDNET_LANES == 8
  const Floats eight = value;
#endif
#if PUDNET_LANES >= 8
  const Four four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  const Four four = value;
#endif
  const Four two = four + __builtin_shufflevector(four, four, 2, 3, 0, 1);
  return two[0] + two[1];
}

// The sums of four vectors, bit by bit those of `sum`, for little more than the price of one.
inline void sum_four(const Floats* values, float* sums) {
#if PUDNET_LANES == 16
#define PUDNET_HALVES(a, b)                                                                    \
  (__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) + \
   __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  const Floats ab = PUDNET_HALVES(values[0], values[1]), cd = PUDNET_HALVES(values[2], values[3]);
#undef PUDNET_HALVES
  // One quarter for each of the four vectors.
  Floats all = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  all += __builtin_shufflevector(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  all += __builtin_shufflevector(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  for (int v = 0; v < 4; ++v) sums[v] = all[4 * v];
#else
  for (int v = 0; v < 4; ++v) sums[v] = sum(values[v]);
#endif
}

inline float dot(const float* a, const float* b, std::int64_t count) {
  Floats sums{};
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) sums += load(a + j) * load(b + j);
  float result = sum(sums);
  for (; j < count; ++j) result += a[j] * b[j];
  return result;
}
