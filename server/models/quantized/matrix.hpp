// Rows of prompts times panels by a matrix unit (Intel AMX), in bfloat16 with sums in float32.
//
// Activations are rounded to bfloat16, and so are weights, which are unpacked once for all rows of a chunk. A row's
// result does not depend on the other rows: the unit computes each number of a tile for itself, in one order.

#pragma once

#include <algorithm>

#include "../../../attention/kernels/cpu/matrix_use.hpp"
#include "panel.hpp"

#if defined(__AMX_BF16__)

constexpr int kMatrixPanels = 2;  // that are multiplied together

static_assert(kColumns == kLanes && sizeof(Block) == 2 * kGroup, "a tile's row is a group in bfloat16, or a block");

// Where rows in bfloat16 lie: tile by tile of rows, and in it group by group. `rows` is the first of all.
inline Block* in_tiles(Block* rows, int64_t row, int64_t groups) {
  return rows + row / kMatrixRows * groups * kMatrixRows + row % kMatrixRows;
}

// Groups of a row, each in the place of a block.
inline void to_bfloat16(const float* numbers, int64_t groups, Block* row) {
  for (int64_t group = 0; group < groups; ++group, numbers += kGroup)
    store(row + group * kMatrixRows, _mm512_cvtne2ps_pbh((__m512)floats(numbers + kLanes), (__m512)floats(numbers)));
}

// Weights of a group and a panel, [kGroup / 2] times two inputs of each of kColumns outputs.
using MatrixWeights = Bits[kGroup / 2];

// To the nearest; of two equally near, the one that is further from 0.
inline Bits two_bfloat16(Floats first, Floats second) {
  return ((Bits)first + 0x8000u) >> 16 | (((Bits)second + 0x8000u) & 0xffff0000u);
}

// Some panels, at most kMatrixPanels, of `groups` groups each.
struct PanelsAt {
  const uint8_t* codes;
  const uint16_t* scales;
  int64_t panels, groups;
};

// The groups from `first` to `end`, [groups][kMatrixPanels]; a panel beyond the last is the last one again.
template <Form kForm>
void unpack_bfloat16(const PanelsAt& from, int64_t first, int64_t end, MatrixWeights* to) {
  constexpr int steps = code_steps(kForm);
  const auto table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t panel = 0; panel < kMatrixPanels; ++panel)
    for (int64_t group = first; group < end; ++group) {
      const int64_t at = std::min(panel, from.panels - 1) * from.groups + group;
      const uint16_t* factors = from.scales + at * group_scales(kForm);
      const Floats scale = halves(factors),
                   offset = kForm == Form::kFour ? halves(factors + kColumns) : scale * -128.0f;
      Bits* own = to[(group - first) * kMatrixPanels + panel];
#pragma GCC unroll 8
      for (int step = 0; step < steps; ++step) {
        const auto both = load<Bits>(from.codes + at * group_bytes(kForm) + step * kStepBytes);
        const auto weight = [&](int shift) {
          const Bits code = both >> shift;  // and higher bits, which the table ignores
          const auto whole = kForm == Form::kFour ? (Floats)_mm512_permutexvar_ps((__m512i)code, table)
                                                  : __builtin_convertvector((Ints)(code & 255u), Floats);
          return multiply_add(scale, whole, offset);
        };
        own[2 * step] = two_bfloat16(weight(0), weight(8));
        own[2 * step + 1] = two_bfloat16(weight(16), weight(24));
        if (kForm != Form::kFour) continue;
        own[2 * (step + steps)] = two_bfloat16(weight(4), weight(12));
        own[2 * (step + steps) + 1] = two_bfloat16(weight(20), weight(28));
      }
    }
}

constexpr int64_t kBand = 2 * kMatrixRows;  // rows that are multiplied together
constexpr int64_t kPart = 10;               // groups at most whose unpacked weights stay in the first cache

// Results of a band, [kBand][kMatrixPanels].
using Band = Floats[kBand * kMatrixPanels];

// Adds the products of a band's rows in some groups to its results, or begins them; `groups` is a row's number of all.
inline void multiply_band(const MatrixWeights* weights, const Block* rows, int64_t groups, int64_t count, bool begin,
                          Band& results) {
  constexpr int64_t kTile = kMatrixRows * kMatrixPanels, kStride = sizeof(Floats) * kMatrixPanels;
  const Block* others = rows + kMatrixRows * groups;
  if (begin) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, results, kStride);
    _tile_loadd(1, results + 1, kStride);
    _tile_loadd(2, results + kTile, kStride);
    _tile_loadd(3, results + kTile + 1, kStride);
  }
  for (int64_t group = 0; group < count; ++group, weights += kMatrixPanels) {
    _tile_loadd(6, weights[0], sizeof(Bits));
    _tile_loadd(4, rows + group * kMatrixRows, sizeof(Block));
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights[1], sizeof(Bits));
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, others + group * kMatrixRows, sizeof(Block));
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, results, kStride);
  _tile_stored(1, results + 1, kStride);
  _tile_stored(2, results + kTile, kStride);
  _tile_stored(3, results + kTile + 1, kStride);
}

constexpr int64_t kZeroRows = kBand - 1;  // at most, that fill the last band

// The same rows with those zeros: whole bands.
constexpr int64_t in_bands(int64_t rows) { return (rows + kZeroRows) / kBand * kBand; }

// The products of rows in bfloat16 with some panels. `weights` has room for kPart groups, `results` for all bands.
// `ask` is told each band's first row, early enough for memory to bring where its results will go.
template <Form kForm, class Ask>
void multiply_bfloat16(const PanelsAt& panels, const Block* rows, int64_t count, MatrixWeights* weights, Band* results,
                       Ask ask) {
  const int64_t groups = panels.groups, parts = (groups + kPart - 1) / kPart;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = groups * part / parts, end = groups * (part + 1) / parts;
    unpack_bfloat16<kForm>(panels, first, end, weights);
    let_matrix_unit_read();
    for (int64_t band = 0; band * kBand < count; ++band) {
      if (part == 0) ask(band * kBand);
      multiply_band(weights, rows + band * kBand * groups + first * kMatrixRows, groups, end - first, part == 0,
                    results[band]);
    }
  }
}

#else

constexpr int64_t kZeroRows = 0;

constexpr int64_t in_bands(int64_t rows) { return rows; }

#endif
