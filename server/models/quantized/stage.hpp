// Arguments of the calls; native.py has the same structures.

#pragma once

#include <cstdint>

// Rows times packed weights, and what goes before and after. Rows lie `stride` numbers apart.
struct Stage {
  const float* input;    // [rows, inputs], or [rows, 2 * inputs] where gated
  const float* norm;     // [inputs], weights of an RMSNorm before; or null
  const uint8_t* codes;  // see packing.py
  const uint16_t* scales;
  const float* bias;     // [outputs] or null
  float* output;         // [rows, outputs]; or null, in the last stage of a run that has `likely`
  const float* cosines;  // [positions, head_size], where the first heads of the output are rotated; or null
  const float* sines;
  const int64_t* positions;  // [rows]; or null: each row's is its own number
  const float* query_norm;   // [head_size], weights of an RMSNorm of each head before; or null
  const float* key_norm;
  int64_t* likely;  // [rows], each row's output with the largest value, -1 where that is not finite; or null
  int64_t input_stride, output_stride, inputs, outputs, bits;
  int64_t gated;  // the input is silu(first half) * second half
  int64_t added;  // to what the output holds
  int64_t query_heads, kv_heads, head_size;
  double epsilon, head_epsilon;
};

// Stages, one after another on the same rows.
struct Run {
  const Stage* stages;
  void* parallel;  // GOMP_parallel and GOMP_barrier of the OpenMP runtime that torch uses
  void* barrier;
  const bool* given;  // [rows], whether a row belongs to a prompt; or null: none does
  int64_t count, rows, threads;
};

// Weights to be packed.
struct Pack {
  const float* weights;  // [outputs, inputs]
  uint8_t* codes;
  uint16_t* scales;
  void* parallel;
  int64_t inputs, outputs, bits, threads;
  int64_t exactly;        // or not at all: packing stops at a group without exact codes
  int64_t exact, finite;  // the answers: the codes stand for exactly these weights; all scales are finite
};

// Rows of a packed table of embeddings.
struct LookUp {
  const int64_t* ids;  // [rows]
  const uint8_t* codes;
  const uint16_t* scales;
  float* output;  // [rows, inputs]
  int64_t rows, inputs, outputs, bits;
  int64_t missing;  // the answer: how many ids are none of the outputs; their rows are left as they are
};
