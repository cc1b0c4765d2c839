// What the matrix products share: a task, and the table of loops of one weight format.
#pragma once

#include <cstdint>

namespace xexport {

// Rows of activations, quantized once and read by every row of weights.
struct Activations {
  const uint8_t* codes;   // a row: blocks * block numbers, in the order of the format's loops
  int64_t row_bytes;
  const float* scales;    // [tokens, blocks]: a number's value is code * scale; NaN if the block isn't finite
  const int32_t* offsets; // [tokens, blocks]: zero point of the weights times the sum of the codes
};

// y [tokens, columns] = x times the transpose of the weights [columns, depth].
struct Product {
  const float* x;       // [tokens, depth]
  Activations quantized;
  const uint8_t* codes; // the weights: [columns, blocks, bytes of a block], or floats [columns, depth]
  const void* scales;   // [columns, blocks]
  float* y;
  int64_t tokens, depth, columns, blocks, block;
};

struct ProductLoops {
  int64_t group;  // rows of weights that `rows` reads together
  int64_t panel;  // rows of weights that `tile` reads together
  int64_t many;   // tokens from which `tile` is the faster one
  // Bytes that one token's activations take, and floats of scratch memory for `rows` and `tile`.
  int64_t (*row_bytes)(int64_t blocks, int64_t block);
  int64_t (*scratch)(const Product&);
  // One row of activations, x[depth].
  void (*quantize)(const float* x, int64_t depth, int64_t blocks, int64_t block, uint8_t* codes, float* scales,
                   int32_t* offsets);
  // Columns [first, last) of y for every token: weights are read from memory once. For few tokens.
  void (*rows)(const Product&, int64_t first, int64_t last, float* scratch);
  // Columns [first, first + panel) of y for tokens [begin, end): for many tokens.
  void (*tile)(const Product&, int64_t first, int64_t begin, int64_t end, float* scratch);
};

}  // namespace xexport
