// Weights of few bits times activations of eight, in whole numbers, as wide as the machine's vectors.
//
// A vector holds four neighboring inputs' codes of each of kLanes outputs. Weights' codes count from 0,
// activations' codes are -127 to 127. Where the machine multiplies unsigned by signed bytes into 16 bits only,
// the sums over a group of 32 inputs fit as long as codes have 4 bits: 32 / 2 * 2 * 15 * 127 < 2^15 for each
// pair; codes of 8 bits are two of 4 there.

#pragma once

#include "../../../attention/kernels/cpu/lanes.hpp"

constexpr int kGroup = 32;    // inputs that share a scale
constexpr int kColumns = 16;  // outputs that lie together: a panel
constexpr int kVectors = kColumns / kLanes;
constexpr int kSteps = kGroup / 4;
constexpr int kStepBytes = 4 * kColumns;  // codes of a panel for four inputs, a byte each

using Codes __attribute__((vector_size(4 * kLanes))) = uint8_t;

inline Codes low(Codes codes) { return codes & 15; }
inline Codes high(Codes codes) { return (Codes)((Bits)codes >> 4) & 15; }

// Four activations' codes, for every output.
inline Ints spread(const int8_t* four) { return Ints{} + load<int32_t>(four); }

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define LONGSPAN_PRODUCTS 4
inline Ints products(Ints sum, Codes weights, Ints inputs) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)inputs);
}
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
#define LONGSPAN_PRODUCTS 4
inline Ints products(Ints sum, Codes weights, Ints inputs) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)inputs);
}
#elif defined(__AVX512BW__)
#define LONGSPAN_PRODUCTS 2
inline Ints products(Ints sum, Codes weights, Ints inputs) {
  return (Ints)_mm512_add_epi16((__m512i)sum, _mm512_maddubs_epi16((__m512i)weights, (__m512i)inputs));
}
inline Ints pairs(Ints sums, int factor) {
  return (Ints)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(static_cast<short>(factor)));
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define LONGSPAN_PRODUCTS 2
inline Ints products(Ints sum, Codes weights, Ints inputs) {
  return (Ints)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)weights, (__m256i)inputs));
}
inline Ints pairs(Ints sums, int factor) {
  return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(static_cast<short>(factor)));
}
#elif defined(__ARM_FEATURE_DOTPROD)
// Of signed bytes only: weights' codes of 8 bits have their 128 taken off before, and sums need no shift.
#define LONGSPAN_PRODUCTS 1
inline Ints products(Ints sum, Codes weights, Ints inputs) {
  return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)weights, (int8x16_t)inputs);
}
#else
#define LONGSPAN_PRODUCTS 0
#endif

#if LONGSPAN_PRODUCTS == 0
// No such instruction, or none that is known here.
inline Ints products(Ints sum, Codes weights, Ints inputs) {
  for (int i = 0; i < 4; ++i) {
    const Ints input = (Ints)((Bits)inputs << (24 - 8 * i)) >> 24;
    sum += (Ints)(((Bits)weights >> (8 * i)) & 255u) * input;
  }
  return sum;
}
#endif

// Keeps the compiler from adding in another order, which would keep more sums than there are registers.
inline void in_order(Ints& sum) {  // NOLINT(misc-const-correctness): the assembly may change it
#if defined(__x86_64__)
  asm("" : "+v"(sum));
#elif defined(__aarch64__)
  asm("" : "+w"(sum));
#endif
}

// The sum over a group, for each of kLanes outputs.
template <int kBits>
struct Sum {
  static constexpr int kParts = LONGSPAN_PRODUCTS == 2 && kBits == 8 ? 2 : 1;
  static constexpr bool kSigned = LONGSPAN_PRODUCTS == 1 && kBits == 8;  // the sums are without the codes' 128
  Ints parts[kParts] = {};

  void add(Codes weights, Ints inputs) {
    parts[0] = products(parts[0], kSigned ? weights ^ 128 : kParts == 2 ? low(weights) : weights, inputs);
    in_order(parts[0]);
    if constexpr (kParts == 2) {
      parts[1] = products(parts[1], high(weights), inputs);
      in_order(parts[1]);
    }
  }
  void keep(Ints* kept) const {
    for (int i = 0; i < kParts; ++i) store(kept + i, parts[i]);
  }
  static Ints total(const Ints* kept) {
#if LONGSPAN_PRODUCTS == 2
    if constexpr (kParts == 2) return pairs(kept[0], 1) + pairs(kept[1], 16);
    return pairs(kept[0], 1);
#else
    return kept[0];
#endif
  }
};

// Rounded once, the same in every loop that it is compiled into.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

inline Floats halves(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(load<__m128i>(from));
#elif defined(__aarch64__)
  return (Floats)vcvt_f32_f16(load<float16x4_t>(from));
#else
  Floats wide;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = from[i], magnitude = (bits & 0x7fffu) << 13;
    float scaled;
    std::memcpy(&scaled, &magnitude, sizeof scaled);
    scaled *= 5.192296858534828e33f;  // 2^112, which moves the exponent to float32's; scales are finite
    wide[i] = bits & 0x8000u ? -scaled : scaled;
  }
  return wide;
#endif
}
