// The call of float_linear.cpp; float_linear.py builds it.

#pragma once

#include <cstdint>

// A linear layer of float32 with what often follows it: GELU, or the sum with other rows and its LayerNorm (Ba et al.
// 2016).
struct FloatLinear {
  const float* input;    // [rows, inputs]
  const float* weights;  // [outputs rounded up / kPanel, inputs, kPanel], with zeros after the last output
  const float* bias;     // [outputs rounded up]
  const float* added;    // [rows, outputs], or null
  const float* scale;    // [outputs], of the norm, or null without one
  const float* shift;    // [outputs], of the norm
  float* output;         // [rows, outputs]
  void* parallel;        // GNU OpenMP's GOMP_parallel
  int64_t rows, inputs, outputs;
  int64_t gelu;  // 1: x times the share of a normal distribution that is below x (Hendrycks and Gimpel 2016)
  int64_t threads;
  double epsilon;  // of the norm
};
