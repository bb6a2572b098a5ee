// What a core can do at most, for figures that are stated as a share of it: products in registers, and reading.

#include "../../attention/kernels/cpu/matrix_use.hpp"
#include "../../server/models/quantized/codes.hpp"

namespace {

constexpr int kSums = 12;  // in turn, so that none waits for itself: a sum takes 5 cycles at most, two begin in one

// A vector of which the compiler knows nothing: it can neither leave it out nor bring it into another order. Factors
// are such before each product, too: where a product and its addition are two instructions, it would be computed once.
template <class Vector>
[[gnu::always_inline]] inline void needed(Vector& vector) {
#if defined(__aarch64__)
  asm volatile("" : "+w"(vector));
#else
  asm volatile("" : "+x"(vector));
#endif
}

struct Integers {
  using Vector = Ints;
  static constexpr int kProducts = 4 * kLanes;
  Ints codes = Ints{} + 0x01010101;
  [[gnu::always_inline]] void add(Vector& sum) {
    needed(codes);
    sum = products(sum, (Codes)codes, codes);
    needed(sum);
  }
};

#if defined(__AMX_BF16__)
// Products of a matrix unit: of four tiles with one, so that none waits for itself.
[[gnu::noinline]] int64_t repeat_in_matrix(int64_t rounds) {
  const MatrixUse matrix;
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return rounds * 4 * (16 * 16 * 32) * 2;
}
#elif defined(__AVX512BF16__)
struct Pairs {
  using Vector = Floats;
  static constexpr int kProducts = 2 * kLanes;
  Ints ones = Ints{} + 0x3f803f80;
  [[gnu::always_inline]] void add(Vector& sum) {
    needed(ones);
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)ones, (__m512bh)ones);
    needed(sum);
  }
};
#endif

struct Singles {
  using Vector = Floats;
  static constexpr int kProducts = kLanes;
  Floats ones = splat(1.0f);
  [[gnu::always_inline]] void add(Vector& sum) {
    needed(ones);
    sum = multiply_add(ones, ones, sum);
    needed(sum);
  }
};

// Returns operations, two for each product that is added to a sum. Each sum is a variable, since GCC keeps an array of
// them in memory.
template <class Kind>
[[gnu::noinline]] int64_t repeat(int64_t rounds, Kind kind) {
  typename Kind::Vector a = {}, b = {}, c = {}, d = {}, e = {}, f = {}, g = {}, h = {}, i = {}, j = {}, k = {}, l = {};
  for (int64_t round = 0; round < rounds; ++round) {
    kind.add(a), kind.add(b), kind.add(c), kind.add(d), kind.add(e), kind.add(f);
    kind.add(g), kind.add(h), kind.add(i), kind.add(j), kind.add(k), kind.add(l);
  }
  return rounds * kSums * Kind::kProducts * 2;
}

}  // namespace

// Operations on 8-bit integers (0), bfloat16 (1) or float32 (2); 0 where the level has no instruction for them.
extern "C" __attribute__((visibility("default"))) int64_t longspan_multiply(int64_t kind, int64_t rounds) {
  if (kind == 0) return repeat(rounds, Integers{});
  if (kind == 2) return repeat(rounds, Singles{});
#if defined(__AMX_BF16__)
  return repeat_in_matrix(rounds);
#elif defined(__AVX512BF16__)
  return repeat(rounds, Pairs{});
#else
  return 0;
#endif
}

// Reads memory once, in order, and returns a number that depends on all of it.
extern "C" __attribute__((visibility("default"))) int64_t longspan_read(const uint8_t* memory, int64_t bytes) {
  constexpr int64_t step = 4 * sizeof(Ints);
  Ints a = {}, b = {}, c = {}, d = {};
  for (int64_t i = 0; i + step <= bytes; i += step) {
    a ^= load<Ints>(memory + i);
    b ^= load<Ints>(memory + i + step / 4);
    c ^= load<Ints>(memory + i + step / 2);
    d ^= load<Ints>(memory + i + step / 4 * 3);
  }
  const Ints all = a ^ b ^ c ^ d;
  int64_t result = 0;
  for (int i = 0; i < kLanes; ++i) result += all[i];
  return result;
}
