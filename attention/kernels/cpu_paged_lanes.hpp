// Vectors as wide as the machine's, and number formats as the kernel reads them.
//
// Compiler vectors instead of intrinsics: the same lines are AVX-512, AVX2, SSE or NEON.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
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

// Numbers of a head are taken in blocks of two vectors, since one vector of pairs of 16-bit numbers is two.
constexpr int kBlock = 2 * kLanes;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef float Four __attribute__((vector_size(16)));

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
inline Floats splat(float number) { return Floats{} + number; }
inline Floats where(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Makes the compiler keep a vector in a register instead of reading it from memory at each use.
inline void keep_at_hand(Floats& vector) {
#if defined(__x86_64__)
  asm("" : "+v"(vector));
#elif defined(__aarch64__)
  asm("" : "+w"(vector));
#endif
}

// A vector's parts, put together by `join`.
template <class Part, class Join>
inline Part folded(Floats vector, Join join) {
  Part parts[sizeof vector / sizeof(Part)];
  std::memcpy(parts, &vector, sizeof vector);
  for (size_t i = 1; i < sizeof vector / sizeof(Part); ++i) parts[0] = join(parts[0], parts[i]);
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
  const __m256 left = _mm256_hadd_ps(folded<__m256>(a, add), folded<__m256>(b, add));
  const __m256 right = _mm256_hadd_ps(folded<__m256>(c, add), folded<__m256>(d, add));
  const __m256 pairs = _mm256_hadd_ps(left, right);
  return _mm256_castps256_ps128(pairs) + _mm256_extractf128_ps(pairs, 1);
#else
  return Four{sum_of(a), sum_of(b), sum_of(c), sum_of(d)};
#endif
}

// To 2e-7 of the result; below -87, where float's exponents end, 0. NaN stays NaN, so that it shows.
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
  const Bits power = (Bits)sum + ((Bits)__builtin_convertvector(twos, Ints) << 23);
  return (Floats)(power & ~(Bits)(x < -87.0f));
}

inline Floats softcapped(Floats logits, float cap) {
  const Floats limit = splat(40.0f);
  const Floats twice = logits * (2.0f / cap);
  const Floats bounded = where(twice > limit, limit, twice);  // tanh is 1 there
  return cap - (2.0f * cap) / (exponential(bounded) + 1.0f);
}

// A number format: how a block of numbers becomes two vectors (`lane` 0 and 1), in an order of its own, and how it is
// multiplied with a block of a query that was brought into the same order; and how a vector becomes as many
// numbers in their own order, rounded to nearest even, and NaN where the format has no finite number for them, so
// that what it cannot hold shows.
template <class Format>
struct Widened {
  struct Lanes {
    Floats first, second;
  };

  template <class Number>
  static Lanes widen(const Number* from) {
    return {Format::lane(from, 0), Format::lane(from, 1)};
  }

  // The place in the block of the number that lies in lane `i` of the two vectors.
  static int place(int i) { return i < kLanes ? 2 * i : 2 * (i - kLanes) + 1; }

  using Keys = Lanes;
  template <class Number>
  static Keys keys(const Number* from) {
    return Format::widen(from);
  }
  static void pack(const float* query, float* packed) {
    for (int i = 0; i < kBlock; ++i) packed[i] = query[Format::place(i)];
  }
  static Floats multiply(Floats sum, Keys keys, const float* query) {
    return sum + keys.first * floats(query) + keys.second * floats(query + kLanes);
  }
};

struct Float32 : Widened<Float32> {
  using Number = float;
  static int place(int i) { return i; }
  static Floats lane(const float* from, int which) { return floats(from + which * kLanes); }
  static Floats narrow(Floats numbers) { return numbers; }
};

struct BFloat16 : Widened<BFloat16> {
  using Number = uint16_t;
  static Floats lane(const uint16_t* from, int which) {
    const Bits pairs = load<Bits>(from);
    return (Floats)(which ? pairs & 0xffff0000u : pairs << 16);
  }
  static Shorts narrow(Floats numbers) {
    const Bits bits = (Bits)numbers;
    const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Bits result = (bits & 0x7fffffffu) >= 0x7f7f8000u ? Bits{} + 0x7fc0u : rounded;
    return __builtin_convertvector(result, Shorts);
  }
#if defined(__AVX512BF16__)
  // The machine's own products of pairs, summed in float32; the query is rounded to bfloat16.
  using Keys = __m512bh;
  static Keys keys(const uint16_t* from) { return load<Keys>(from); }
  static void pack(const float* query, float* packed) {
    store(packed, _mm512_cvtne2ps_pbh((__m512)floats(query + kLanes), (__m512)floats(query)));
  }
  static Floats multiply(Floats sum, Keys keys, const float* query) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, keys, load<Keys>(query));
  }
#endif
};

struct Float16 : Widened<Float16> {
  using Number = uint16_t;
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
  static int place(int i) { return i; }
  static Floats lane(const uint16_t* from, int which) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load<__m256i>(from + which * kLanes));
#else
    return (Floats)_mm256_cvtph_ps(load<__m128i>(from + which * kLanes));
#endif
  }
  static Shorts narrow(Floats numbers) {
#if defined(__AVX512F__)
    const Shorts halves = (Shorts)_mm512_cvtps_ph((__m512)numbers, _MM_FROUND_TO_NEAREST_INT);
#else
    const Shorts halves = (Shorts)_mm256_cvtps_ph((__m256)numbers, _MM_FROUND_TO_NEAREST_INT);
#endif
    return halves | ((Shorts)((halves & 0x7c00) == 0x7c00) & 0x0200);
  }
#else
  static Floats lane(const uint16_t* from, int which) {
    const Bits pairs = load<Bits>(from);
    return half(which ? pairs >> 16 : pairs & 0xffffu);
  }
  static Shorts narrow(Floats numbers) {
    const Bits bits = (Bits)numbers, magnitude = bits & 0x7fffffffu;
    const Bits normal = ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
    // Below 2^-14: adding 1/2 leaves steps of 2^-24.
    const Bits small = (Bits)((Floats)magnitude + 0.5f) - 0x3f000000u;
    const Bits finite = magnitude < 0x38800000u ? small : normal;
    const Bits result = magnitude >= 0x477ff000u ? Bits{} + 0x7e00u : finite;
    return __builtin_convertvector(result | (bits >> 16 & 0x8000u), Shorts);
  }

 private:
  // The exponent is moved to float32's by a product, which also gets subnormal numbers right.
  static Floats half(Bits bits) {
    const Bits magnitude = (bits & 0x7fffu) << 13;
    const Bits special = (Bits)(magnitude >= 0x0f800000u) & 0x7f800000u;
    const Floats scaled = (Floats)magnitude * 5.192296858534828e33f;  // 2^112
    return (Floats)((Bits)scaled | special | ((bits & 0x8000u) << 16));
  }
#endif
};

// The last numbers of a head, which do not fill a block, and zeros.
template <class Format>
struct Rest {
  typename Format::Number numbers[kBlock] = {};
  Rest(const typename Format::Number* from, int64_t count) { std::memcpy(numbers, from, count * sizeof *from); }
};
