// Products with constant weights, one or several that do not need each other's results: activations are quantized
// once, and all threads share the work of all of them.
#pragma once

#include "operator.h"
#include "products.h"

namespace xexport {

// One product of a call.
struct Multiplication {
  const ProductLoops* loops;
  Product task;  // all but the quantized activations
  double bytes;  // of the weights
};

constexpr size_t kMostMultiplications = 16;

// All of them, at most kMostMultiplications; those with the largest weights should come first.
void multiply(const Call& call, Multiplication* products, size_t count);

}  // namespace xexport
