// Vectors as wide as the processor's, and dtypes as the kernel reads them.
//
// Compiler vectors instead of intrinsics: the same lines are AVX-512, AVX2, SSE or NEON.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pairs of 16-bit numbers are read as one of 32 bits");

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

// Numbers of a head are taken in blocks of two vectors: one vector of 16-bit numbers widens to two of floats.
constexpr int kBlock = 2 * kLanes;

using Floats __attribute__((vector_size(4 * kLanes))) = float;
using Ints __attribute__((vector_size(4 * kLanes))) = int32_t;
using Bits __attribute__((vector_size(4 * kLanes))) = uint32_t;
using Shorts __attribute__((vector_size(2 * kLanes))) = uint16_t;
using Four __attribute__((vector_size(16))) = float;

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
inline void store(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

inline Floats floats(const float* from) { return load<Floats>(from); }
// A number minus 0 is itself, so the compiler leaves the subtraction out; 0 plus -0 is not -0, so it would add.
inline Floats splat(float number) { return number - Floats{}; }
inline Floats where(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Makes the compiler keep a vector in a register instead of reading it from memory at each use.
template <class Vector>
inline void keep_at_hand(Vector& vector) {
#if defined(__x86_64__)
  asm("" : "+v"(vector));
#elif defined(__aarch64__)
  asm("" : "+w"(vector));
#endif
}

// A vector's parts, combined by `join`.
template <class Part, class Join>
inline Part folded(Floats vector, Join join) {
  constexpr size_t kParts = sizeof vector / sizeof(Part);  // NOLINT(bugprone-sizeof-expression): 1 on narrow machines
  Part parts[kParts];
  std::memcpy(parts, &vector, sizeof vector);
  for (size_t i = 1; i < kParts; ++i) parts[0] = join(parts[0], parts[i]);
  return parts[0];
}

template <class Join>
inline float joined(Floats vector, Join join) {
  const Four four = folded<Four>(vector, join);
  return join(join(four[0], four[1]), join(four[2], four[3]));
}

inline float sum_of(Floats vector) {
  return joined(vector, [](auto a, auto b) { return a + b; });
}

inline float largest_of(Floats vector) {
  return joined(vector, [](auto a, auto b) { return a > b ? a : b; });
}

// The sum of each of four vectors.
inline Four sums(Floats a, Floats b, Floats c, Floats d) {
#if defined(__AVX2__)
  const auto add = [](auto x, auto y) { return x + y; };
  // A blend is cheap, a horizontal sum two shuffles and an addition.
  const auto both = [&](Floats x, Floats y) {
    const auto one = folded<__m256>(x, add), other = folded<__m256>(y, add);
    return _mm256_shuffle_ps(one, other, 0x4e) + _mm256_blend_ps(one, other, 0xcc);
  };
  const __m256 left = both(a, b), right = both(c, d);
  const __m256 all = _mm256_shuffle_ps(left, right, 0x88) + _mm256_shuffle_ps(left, right, 0xdd);
  return _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1);
#else
  return Four{sum_of(a), sum_of(b), sum_of(c), sum_of(d)};
#endif
}

// Relative error 2e-7; below -87, where float's exponents end, 0. NaN stays NaN.
inline Floats exponential(Floats x) {
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const Floats twos = (x * 1.44269504f + magic) - magic;
  const Floats rest = (x - twos * 0.693359375f) + twos * 2.12194440e-4f;
  Floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const Ints exponents = __builtin_convertvector(twos, Ints);
  const Bits power = (Bits)sum + ((Bits)exponents << 23);
  return (Floats)(power & ~(Bits)(x < -87.0f));
}

// Logits are to the base of 2.
constexpr float kLog2E = 1.44269504f;

// 2 to the power of x <= 0, relative error 2e-7; below -126.5, where float's exponents end, 0 or less than
// 1e-38. NaN stays NaN. Of the polynomials of degree 5 that are 1 at 0, each has the least largest relative
// error: 8.3e-8 and 9.2e-8.
inline Floats power_of_two(Floats x) {
#if defined(__AVX512DQ__)
  const auto rest = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // of -infinity: 0
  Floats sum = rest * 1.86713028e-3f + 9.01702988e-3f;
  sum = sum * rest + 5.57999134e-2f;
  sum = sum * rest + 2.40164450e-1f;
  sum = sum * rest + 6.93151312e-1f;
  sum = sum * rest + 1.0f;
  return (Floats)_mm512_scalef_ps((__m512)sum, (__m512)x);  // takes the whole number below x
#else
  Floats lowest = splat(-127.0f);
  keep_at_hand(lowest);  // a known constant would be compared in an order for which there is no single instruction
  const Floats bounded = larger(lowest, x);
  const Floats magic = splat(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const Floats shifted = bounded + magic;            // its last bits are the result's exponent
  const Floats rest = bounded - (shifted - magic);
  Floats sum = rest * 1.3264727e-3f + 9.6715128e-3f;
  sum = sum * rest + 5.5507337e-2f;
  sum = sum * rest + 2.4022242e-1f;
  sum = sum * rest + 6.9314698e-1f;
  sum = sum * rest + 1.0f;
  return sum * (Floats)((Bits)shifted << 23);
#endif
}

inline Floats softcapped(Floats logits, float cap) {
  const Floats limit = splat(40.0f);
  const Floats twice = logits * (2.0f / cap);
  const Floats bounded = where(twice > limit, limit, twice);  // tanh is 1 there
  return cap - (2.0f * cap) / (exponential(bounded) + 1.0f);
}

// A dtype: how a block of numbers becomes two vectors (`lane` 0 and 1), possibly in another order, and how it is
// multiplied with a block of a query in that same order. `cast` turns a vector into numbers of the dtype in their
// original order, rounded to nearest even, and NaN where they exceed its finite range.
template <class Format>
struct Widened {  // NOLINT(bugprone-crtp-constructor-accessibility): none is ever constructed
  struct Lanes {
    Floats first, second;
  };

  template <class Number>
  static Lanes widen(const Number* from) {
    return {Format::lane(from, 0), Format::lane(from, 1)};
  }

  // The place in the block of the number that lies in lane `i` of the two vectors.
  static constexpr int place(int i) { return i < kLanes ? 2 * i : 2 * (i - kLanes) + 1; }

  // A block's product takes kSteps steps, each with one operand of the key and one of the query.
  static constexpr int kSteps = 2;
  using Operand = Floats;
  template <class Number>
  static Operand key(const Number* from, int step) {
    return Format::lane(from, step);
  }
  static Operand query(const float* packed, int step) { return floats(packed + step * kLanes); }
  static Floats multiply(Floats sum, Operand key, Operand query) { return sum + key * query; }
  static void pack(const float* query, float* packed) {
    for (int i = 0; i < kBlock; ++i) packed[i] = query[Format::place(i)];
  }
};

struct Float32 : Widened<Float32> {
  using Number = float;
  static constexpr int place(int i) { return i; }
  static Floats lane(const float* from, int which) { return floats(from + which * kLanes); }
  static Floats cast(Floats numbers) { return numbers; }
};

struct BFloat16 : Widened<BFloat16> {
  using Number = uint16_t;
  static Floats lane(const uint16_t* from, int which) {
    const Bits pairs = load<Bits>(from);
    return (Floats)(which ? pairs & 0xffff0000u : pairs << 16);
  }
  static Shorts cast(Floats numbers) {
    const Bits bits = (Bits)numbers;
    const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Bits result = (bits & 0x7fffffffu) >= 0x7f7f8000u ? Bits{} + 0x7fc0u : rounded;
    return __builtin_convertvector(result, Shorts);
  }
#if defined(__AVX512BF16__)
  // The machine's own products of pairs, summed in float32; the query is rounded to bfloat16.
  static constexpr int kSteps = 1;
  using Operand = __m512bh;
  static Operand key(const uint16_t* from, int) { return load<Operand>(from); }
  static Operand query(const float* packed, int) { return load<Operand>(packed); }
  static Floats multiply(Floats sum, Operand key, Operand query) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, key, query);
  }
  static void pack(const float* query, float* packed) {
    store(packed, _mm512_cvtne2ps_pbh((__m512)floats(query + kLanes), (__m512)floats(query)));
  }
#endif
};

struct Float16 : Widened<Float16> {
  using Number = uint16_t;
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
  static constexpr int place(int i) { return i; }
  static Floats lane(const uint16_t* from, int which) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load<__m256i>(from + which * kLanes));
#else
    return (Floats)_mm256_cvtph_ps(load<__m128i>(from + which * kLanes));
#endif
  }
  static Shorts cast(Floats numbers) {
#if defined(__AVX512F__)
    const auto halves = (Shorts)_mm512_cvtps_ph((__m512)numbers, _MM_FROUND_TO_NEAREST_INT);
#else
    const auto halves = (Shorts)_mm256_cvtps_ph((__m256)numbers, _MM_FROUND_TO_NEAREST_INT);
#endif
    return halves | ((Shorts)((halves & 0x7c00) == 0x7c00) & 0x0200);
  }
#else
  static Floats lane(const uint16_t* from, int which) {
    const Bits pairs = load<Bits>(from);
    return half(which ? pairs >> 16 : pairs & 0xffffu);
  }
  static Shorts cast(Floats numbers) {
    const Bits bits = (Bits)numbers, magnitude = bits & 0x7fffffffu;
    const Bits normal = ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
    // Below 2^-14: adding 1/2 leaves steps of 2^-24.
    const Bits small = (Bits)((Floats)magnitude + 0.5f) - 0x3f000000u;
    const Bits finite = magnitude < 0x38800000u ? small : normal;
    const Bits result = magnitude >= 0x477ff000u ? Bits{} + 0x7e00u : finite;
    return __builtin_convertvector(result | (bits >> 16 & 0x8000u), Shorts);
  }

 private:
  // A product moves the exponent to float32's, which is also right for subnormal numbers.
  static Floats half(Bits bits) {
    const Bits magnitude = (bits & 0x7fffu) << 13;
    const Bits special = (Bits)(magnitude >= 0x0f800000u) & 0x7f800000u;
    const Floats scaled = (Floats)magnitude * 5.192296858534828e33f;  // 2^112
    return (Floats)((Bits)scaled | special | ((bits & 0x8000u) << 16));
  }
#endif
};

// The last numbers of a head, which do not fill a block, padded with zeros.
template <class Format>
struct Rest {
  typename Format::Number numbers[kBlock] = {};
  Rest(const typename Format::Number* from, int64_t count) { std::memcpy(numbers, from, count * sizeof *from); }
};
