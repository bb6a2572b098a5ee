// A thread's use of a matrix unit (Intel AMX).

#pragma once

#include <cstdint>

#if defined(__AMX_TILE__)
#include <immintrin.h>

constexpr bool kMatrixUnit = true;

constexpr int kMatrixRows = 16;  // of a tile, each of 64 bytes

// All registers of the unit hold whole tiles. They are saved and loaded with the thread's others as long as they are in
// use.
class MatrixUse {
 public:
  MatrixUse() {
    struct alignas(64) Shapes {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Shapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~MatrixUse() { _tile_release(); }
  MatrixUse(const MatrixUse&) = delete;
  MatrixUse& operator=(const MatrixUse&) = delete;
};

// Intrinsics do not say what the unit reads: what was written before must be in memory.
inline void let_matrix_unit_read() { asm volatile("" : : : "memory"); }

#else

constexpr bool kMatrixUnit = false;

struct MatrixUse {};

#endif
