#pragma once

#include "../native/isa.h"
#include "../native/products.h"

namespace xexport {
XEXPORT_DECLARE_LOOPS(ProductLoops, linear_int6x8_loops)
}  // namespace xexport
