// Vectors for the CPU kernels: the compiler's own vector types at the width of the instruction set this file is
// compiled for, so that one source serves SSE2, AVX2, AVX-512 and NEON.
//
// Included only by the files that are compiled once per instruction set. Nothing here may have external linkage: the
// linker keeps one copy of an inline function, and a copy compiled for AVX-512 must never serve an older processor.
// Everything is therefore always inlined or inside an anonymous namespace (tests/test_build.py looks at the objects).
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define TK_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define TK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TK_VECTOR_BYTES 32
#else
#define TK_VECTOR_BYTES 16
#endif

namespace {

constexpr int kVectorBytes = TK_VECTOR_BYTES;

typedef float FloatVector __attribute__((vector_size(TK_VECTOR_BYTES)));
typedef int32_t Int32Vector __attribute__((vector_size(TK_VECTOR_BYTES)));
typedef uint8_t ByteVector __attribute__((vector_size(TK_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(TK_VECTOR_BYTES)));
typedef int64_t Int64Vector __attribute__((vector_size(TK_VECTOR_BYTES)));

// Of each accumulation type: its vector, the integers of the same width, and the constants of exp.
template <typename A>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = FloatVector;
  using Int = int32_t;
  using IntVector = Int32Vector;
  static constexpr int count = kVectorBytes / 4;
  static constexpr int mantissa_bits = 23;
  static constexpr float log2e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f;  // 10 bits, so that n * ln2_high is exact
  static constexpr float ln2_low = -2.12194440e-4f;
  static constexpr float round_magic = 12582912.0f + 127.0f;  // 1.5 * 2^23: rounds to an integer; 127: exponent bias
  static constexpr float smallest = -87.33654f;               // -126 ln 2
  // e^r = 1 + r + r^2 q(r) on |r| <= ln2 / 2, minimax in relative error: 3.1e-9.
  static constexpr int degree = 5;
  static constexpr float q[degree] = {0.4999999345f, 0.1666652063f, 0.04166838805f, 0.00836871688f, 0.001381459865f};
  static constexpr int32_t sqrt_half_bits = 0x3f3504f3;
  static constexpr int log_terms = 5;  // of atanh's series at most 3 - sqrt(8) = 0.17 away: 3e-9
};

template <>
struct Lanes<double> {
  using Vector = DoubleVector;
  using Int = int64_t;
  using IntVector = Int64Vector;
  static constexpr int count = kVectorBytes / 8;
  static constexpr int mantissa_bits = 52;
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2_high = 0.6931471803691238;  // 32 bits
  static constexpr double ln2_low = 1.9082149292705877e-10;
  static constexpr double round_magic = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52
  static constexpr double smallest = -708.3964185322641;              // -1022 ln 2
  // As above: 3.6e-18.
  static constexpr int degree = 10;
  static constexpr double q[degree] = {0.5000000000000010627,     0.1666666666666641252,   0.04166666666653015859,
                                       0.008333333333494461664,   0.001388888894363011295, 0.0001984126950657868765,
                                       0.00002480149309890655066, 2.755758637384016369e-6, 2.763024837921144398e-7,
                                       2.50000616028356667e-8};
  static constexpr int64_t sqrt_half_bits = 0x3fe6a09e667f3bcd;
  static constexpr int log_terms = 10;  // 1e-17
};
constexpr float Lanes<float>::q[];
constexpr double Lanes<double>::q[];

template <typename A>
using Vector = typename Lanes<A>::Vector;
template <typename A>
using IntVector = typename Lanes<A>::IntVector;

template <typename A>
TK_INLINE Vector<A> broadcast(A x) {
  return x - Vector<A>{};
}

template <typename V, typename T>
TK_INLINE V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

template <typename T, typename V>
TK_INLINE void store(T* p, V v) {
  memcpy(p, &v, sizeof(V));
}

// The same past the caches: the old contents of the memory are not read first. p is aligned to the size of V. Other
// threads see the values after finish_streams().
template <typename T, typename V>
TK_INLINE void stream(T* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)v);
#endif
  store(p, v);
}
template <typename T, typename V>
TK_INLINE void store(T* p, V v, bool streamed) {
  streamed ? stream(p, v) : store(p, v);
}
TK_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The first n elements of a vector. The others are read as 0, and are not written.
template <typename V, typename T>
TK_INLINE V load_first(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return (V)_mm512_maskz_loadu_ps((1u << n) - 1, p);
  if constexpr (sizeof(V) == 32 && sizeof(T) == 2) return (V)_mm256_maskz_loadu_epi16((1u << n) - 1, p);
#endif
  V v{};
  memcpy(&v, p, n * sizeof(T));
  return v;
}
template <typename V, typename T>
TK_INLINE void store_first(T* p, V v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
  if constexpr (sizeof(V) == 32 && sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)v);
#endif
  memcpy(p, &v, n * sizeof(T));
}

template <typename T>
TK_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p);
}
template <typename T>
TK_INLINE void prefetch_to_second_level(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// a > b ? a : b: where b is NaN the result is NaN, where a is NaN it is b. gcc does not find the instruction by itself
// where a is constant.
template <typename V>
TK_INLINE V maximum(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) {
    return (V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  } else {
    return (V)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4) {
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
  } else {
    return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
  }
#else
  return a > b ? a : b;
#endif
}

// sum += value in the lanes of the mask. gcc makes a masked addition of it, where there is one, only in this form.
template <typename M, typename V>
TK_INLINE void add_where(M mask, V& sum, V value) {
#if defined(__AVX512F__)
  sum = mask ? sum + value : sum;
#else
  sum += mask ? value : V{};
#endif
}

// -|x|
template <typename A>
TK_INLINE Vector<A> negative_magnitude(Vector<A> x) {
  using I = IntVector<A>;
  return (Vector<A>)((I)x | (I)(broadcast<A>(A(-0.0))));
}

// 1 / x for x of about 1 and more, within 1 ulp.
template <typename A>
TK_INLINE Vector<A> reciprocal(Vector<A> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {  // 14 bits and a Newton step: a third of the time of a division
    const FloatVector y = (FloatVector)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
    return y + y * (1 - x * y);
  }
#endif
  return 1 / x;
}

// q[0] + q[1] x + ... by pairs: fewer steps wait for each other than in Horner's rule. x2: x * x.
template <int kTerms, typename V, typename A>
TK_INLINE V polynomial(const A (&q)[kTerms], V x, V x2) {
  constexpr int kLast = (kTerms - 1) / 2 * 2;
  V sum = kLast + 1 < kTerms ? q[kTerms - 1] * x + q[kLast] : q[kLast] - V{};
#pragma GCC unroll 16
  for (int i = kLast - 2; i >= 0; i -= 2) sum = sum * x2 + (q[i + 1] * x + q[i]);
  return sum;
}

#if defined(__AVX512F__)
// The bits of 2^(j / 16), less j in the bits that n takes.
constexpr int32_t kSixteenthPowers[16] = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                                          0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                                          0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};

// As below, by a table that fits into a register: x = n ln 2 / 16 + r, where |r| <= ln 2 / 32 needs three terms.
TK_INLINE FloatVector exp_by_table(FloatVector x) {
  using L = Lanes<float>;
  constexpr float kMagic = 12582912.0f, kStep = 0.693147182f / 16;  // here ln 2 is wrong by 3e-9 of itself
  const FloatVector shifted = x * (16 * L::log2e) + kMagic;         // its low bits are n
  const FloatVector n = shifted - kMagic;
  const FloatVector r = x - n * kStep;
  const FloatVector exponential_minus_1 = (r * r) * (r * 0.16666667f + 0.5f) + r;  // the error is r^4 / 24: 9e-9
  const __m512i n_bits = _mm512_slli_epi32((__m512i)shifted, L::mantissa_bits - 4);
  const __m512i power =
      _mm512_maskz_permutexvar_epi32(0xffff, (__m512i)shifted, (__m512i)load<Int32Vector>(kSixteenthPowers));
  // 2^(n / 16), by an integer addition that wraps around. For an x that underflows the result is any number.
  const FloatVector scale = (FloatVector)_mm512_add_epi32(n_bits, power);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(L::smallest), _CMP_NLT_UQ);
  return (FloatVector)_mm512_maskz_fmadd_ps(normal, (__m512)exponential_minus_1, (__m512)scale, (__m512)scale);
}
#endif

// e^x for x <= 0 (and for small positive x), with an error of about 1 ulp. Below the smallest normal number it is 0.
// NaN stays NaN.
template <typename A>
TK_INLINE Vector<A> exp_nonpositive(Vector<A> x) {
  using L = Lanes<A>;
  using V = Vector<A>;
  using I = IntVector<A>;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return exp_by_table(x);
#endif
  const V shifted = x * L::log2e + L::round_magic;  // its low bits are n + bias
  const V n = shifted - L::round_magic;
  const V r = (x - n * L::ln2_high) - n * L::ln2_low;
  const V r2 = r * r;
  const V exponential_minus_1 = r2 * polynomial(L::q, r, r2) + r;
  const V scale = (V)((I)shifted << L::mantissa_bits);  // 2^n
#if defined(__AVX512F__)
  const __mmask8 normal = _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(L::smallest), _CMP_NLT_UQ);
  return (V)_mm512_maskz_fmadd_pd(normal, (__m512d)exponential_minus_1, (__m512d)scale, (__m512d)scale);
#else
  return x < L::smallest ? V{} : exponential_minus_1 * scale + scale;
#endif
}

// log(x) + log(1 + f), where x is a power of two times 1 + f in [sqrt(1/2), sqrt(2)).
template <typename A>
TK_INLINE Vector<A> log_of_parts(IntVector<A> exponent, Vector<A> f) {
  using L = Lanes<A>;
  using V = Vector<A>;
  const V s = f * reciprocal<A>(2 + f);
  const V z = s * s;  // log(1 + f) = 2 atanh(s) = 2 s (1 + z / 3 + z^2 / 5 + ...)
  V series = broadcast<A>(A(1) / (2 * L::log_terms + 1));
#pragma GCC unroll 16
  for (int i = L::log_terms - 1; i >= 1; --i) series = series * z + A(1) / (2 * i + 1);
  const V n = __builtin_convertvector(exponent, V);
  const V twice = s + s;
  return n * L::ln2_high + (n * L::ln2_low + (twice * z * series + twice));
}

// The exponent of x > 0, so that x / 2^exponent is in [sqrt(1/2), sqrt(2)), and that quotient.
template <typename A>
TK_INLINE IntVector<A> take_exponent(Vector<A>& x) {
  using L = Lanes<A>;
  using I = IntVector<A>;
  const I exponent = ((I)x - L::sqrt_half_bits) >> L::mantissa_bits;
  x = (Vector<A>)((I)x - (exponent << L::mantissa_bits));
  return exponent;
}

// log(x) for normal x > 0 (for smaller x, and 0, a number below -87), and log(1 + x) for x > -1/4, which keeps its
// relative accuracy as x -> 0. NaN stays NaN.
template <typename A>
TK_INLINE Vector<A> log_positive(Vector<A> x) {
  const Vector<A> not_finite = x - x;
  const IntVector<A> exponent = take_exponent<A>(x);
  return log_of_parts<A>(exponent, x - 1) + not_finite;
}
template <typename A>
TK_INLINE Vector<A> log1p(Vector<A> x) {
  Vector<A> sum = 1 + x;
  const IntVector<A> exponent = take_exponent<A>(sum);
  return log_of_parts<A>(exponent, exponent == 0 ? x : sum - 1) + (x - x);
}

// log(1 + x) for x in [0, 1], which keeps its relative accuracy as x -> 0.
template <typename A>
TK_INLINE Vector<A> log1p_of_fraction(Vector<A> x) {
  if constexpr (sizeof(A) == 4) {  // x q(x), minimax in relative error: 3.0e-8
    constexpr float q[] = {0.9999999699f,  -0.4999949314f, 0.3331909672f,   -0.2484298163f, 0.1910600471f,
                           -0.1366324187f, 0.07822590975f, -0.02950521503f, 0.005232688787f};
    return polynomial(q, x, x * x) * x;
  } else {
    return log1p<A>(x);
  }
}

// The same for x in [0, 3]: log(1 + x) = log 2 + log(1 + (x - 1) / 2).
template <typename A>
TK_INLINE Vector<A> log1p_to_three(Vector<A> x) {
  using V = Vector<A>;
  const IntVector<A> large = x > 1;
  const V reduced = log1p_of_fraction<A>(large ? x * A(0.5) - A(0.5) : x);
  return large ? reduced + (Lanes<A>::ln2_high + Lanes<A>::ln2_low) : reduced;
}

template <typename A>
TK_INLINE double horizontal_sum(Vector<A> v) {
  double sum = 0;
#pragma GCC unroll 16
  for (int i = 0; i < Lanes<A>::count; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

template <typename I>
TK_INLINE bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  const Int64Vector m = (Int64Vector)mask;
  return (m[0] | m[1]) != 0;
#endif
}

// ---- Integers of other widths
//
// __builtin_convertvector says the same, but gcc 12 takes such vectors apart lane by lane. The intrinsics have their
// masked forms, because gcc 12 warns of the header of the others.

template <typename Wide>
struct Integers {
  static constexpr int count = kVectorBytes / sizeof(Wide);
  typedef Wide Vector __attribute__((vector_size(TK_VECTOR_BYTES)));
};

template <typename Wide, typename T>
TK_INLINE typename Integers<Wide>::Vector load_widened(const T* p) {
  using V = typename Integers<Wide>::Vector;
#if defined(__AVX2__)
  constexpr bool kUnsigned = T(-1) > T(0);
  static_assert(!kUnsigned || sizeof(T) == 1, "of the unsigned types only uint8 is a label");
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 1 && sizeof(Wide) == 4) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (V)(kUnsigned ? _mm512_maskz_cvtepu8_epi32(0xffff, x) : _mm512_maskz_cvtepi8_epi32(0xffff, x));
  } else if constexpr (sizeof(T) == 2 && sizeof(Wide) == 4) {
    return (V)_mm512_maskz_cvtepi16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  } else if constexpr (sizeof(T) == 1 && sizeof(Wide) == 8) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return (V)(kUnsigned ? _mm512_maskz_cvtepu8_epi64(0xff, x) : _mm512_maskz_cvtepi8_epi64(0xff, x));
  } else if constexpr (sizeof(T) == 2 && sizeof(Wide) == 8) {
    return (V)_mm512_maskz_cvtepi16_epi64(0xff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else if constexpr (sizeof(T) == 4 && sizeof(Wide) == 8) {
    return (V)_mm512_maskz_cvtepi32_epi64(0xff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 1 && sizeof(Wide) == 4) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return (V)(kUnsigned ? _mm256_cvtepu8_epi32(x) : _mm256_cvtepi8_epi32(x));
  } else if constexpr (sizeof(T) == 2 && sizeof(Wide) == 4) {
    return (V)_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
#endif
  if constexpr (sizeof(T) == sizeof(Wide)) {
    return load<V>(p);
  } else {
    V v;
    for (int k = 0; k < Integers<Wide>::count; ++k) v[k] = p[k];
    return v;
  }
}

template <typename Narrow, typename V>
TK_INLINE void store_narrowed(Narrow* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Narrow) == 4 && sizeof(v[0]) == 8) {
    store(p, _mm512_maskz_cvtepi64_epi32(0xff, (__m512i)v));
    return;
  }
#endif
  if constexpr (sizeof(Narrow) == sizeof(v[0])) {
    store(p, v);
  } else {
    for (int k = 0; k < static_cast<int>(sizeof(V) / sizeof(v[0])); ++k) p[k] = static_cast<Narrow>(v[k]);
  }
}

// A vector of integers as float. gcc 12 would convert the lanes one by one.
TK_INLINE FloatVector convert_long(const int64_t* p) {
#if defined(__AVX512F__)
  const __m256 first = _mm512_maskz_cvtepi64_ps(0xff, _mm512_loadu_si512(p));
  const __m256 second = _mm512_maskz_cvtepi64_ps(0xff, _mm512_loadu_si512(p + 8));
  return (FloatVector)_mm512_mask_broadcast_f32x8(_mm512_maskz_broadcast_f32x8(0x00ff, first), 0xff00, second);
#else
  FloatVector v;
  for (int k = 0; k < Lanes<float>::count; ++k) v[k] = static_cast<float>(p[k]);
  return v;
#endif
}

// ---- 16-bit storage types

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int kHalfLanes = kVectorBytes / 4;
typedef uint16_t HalfVector __attribute__((vector_size(TK_VECTOR_BYTES / 2)));
typedef uint32_t Uint32Vector __attribute__((vector_size(TK_VECTOR_BYTES)));

TK_INLINE Uint32Vector broadcast_bits(uint32_t x) {
  return x - Uint32Vector{};
}

TK_INLINE Uint32Vector widen_bits(HalfVector bits) {
#if defined(__AVX512F__)
  return (Uint32Vector)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);
#elif defined(__AVX2__)
  return (Uint32Vector)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Uint32Vector);
#endif
}

// Of numbers that fit.
TK_INLINE HalfVector narrow_bits(Uint32Vector bits) {
#if defined(__AVX512F__)
  return (HalfVector)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);  // within halves
  return (HalfVector)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x88));
#else
  return __builtin_convertvector(bits, HalfVector);
#endif
}

TK_INLINE FloatVector widen(HalfVector bits, BFloat16) {
  return (FloatVector)(widen_bits(bits) << 16);
}

TK_INLINE HalfVector narrow(FloatVector x, BFloat16) {
#if defined(__AVX512BF16__)
  return (HalfVector)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)x);  // below 2^-126 it is 0
#else
  const Uint32Vector b = (Uint32Vector)x;
  const Uint32Vector rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const Uint32Vector quiet_nan = (b >> 16) | 0x40u;
  return narrow_bits(x != x ? quiet_nan : rounded);
#endif
}

TK_INLINE FloatVector widen(HalfVector bits, Half) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);  // unmasked, gcc 12 warns of its own header
#elif defined(__F16C__)
  return (FloatVector)_mm256_cvtph_ps((__m128i)bits);
#elif defined(__aarch64__)
  typedef __fp16 NativeHalf __attribute__((vector_size(8)));
  return __builtin_convertvector((NativeHalf)bits, FloatVector);
#else
  const Uint32Vector w = widen_bits(bits);
  const Uint32Vector sign = (w & 0x8000u) << 16;
  const Uint32Vector magnitude = (w & 0x7fffu) << 13;
  // To scale by 2^112 adds to the exponent and normalises subnormals, in one exact multiplication.
  const Uint32Vector finite = (Uint32Vector)((FloatVector)magnitude * 5.192296858534828e33f);
  const Uint32Vector special = magnitude | 0x7f800000u;
  return (FloatVector)(sign | (magnitude >= 0x0f800000u ? special : finite));
#endif
}

TK_INLINE HalfVector narrow(FloatVector x, Half) {
#if defined(__AVX512F__)
  return (HalfVector)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (HalfVector)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  typedef __fp16 NativeHalf __attribute__((vector_size(8)));
  return (HalfVector) __builtin_convertvector(x, NativeHalf);
#else
  const Uint32Vector b = (Uint32Vector)x;
  const Uint32Vector sign = (b >> 16) & 0x8000u;
  const Uint32Vector magnitude = b & 0x7fffffffu;
  // To add 0.5 leaves a result below 2^-14 in the low bits, rounded to multiples of 2^-24: the subnormals of float16.
  const Uint32Vector subnormal = (Uint32Vector)((FloatVector)magnitude + 0.5f) - 0x3f000000u;
  const Uint32Vector normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Uint32Vector h = magnitude < 0x38800000u ? subnormal : normal;
  const Uint32Vector infinity = broadcast_bits(0x7c00u);
  h = magnitude >= 0x477ff000u ? infinity : h;  // 65520 and above round to infinity
  h = magnitude > 0x7f800000u ? broadcast_bits(0x7e00u) : h;
  return narrow_bits(h | sign);
#endif
}

// ---- Logits in memory, as vectors of the type of the computation

template <typename T>
struct Accumulation {
  using Type = float;
};
template <>
struct Accumulation<double> {
  using Type = double;
};
template <typename T>
using Compute = typename Accumulation<T>::Type;

template <typename T>
TK_INLINE Vector<Compute<T>> load_logits(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return widen(load<HalfVector>(p), T{});
  } else {
    return load<Vector<T>>(p);
  }
}

template <typename T>
TK_INLINE void store_logits(T* p, Vector<Compute<T>> v, bool streamed) {
  if constexpr (sizeof(T) == 2) {
    store(p, narrow(v, T{}), streamed);
  } else {
    store(p, v, streamed);
  }
}

}  // namespace
