#pragma once

#include "../native/isa.h"
#include "../native/products.h"

namespace xexport {
XEXPORT_DECLARE_LOOPS(ProductLoops, linear_f32_loops)
XEXPORT_DECLARE_LOOPS(ProductLoops, linear_f16_loops)
}  // namespace xexport
