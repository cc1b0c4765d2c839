// xexport::linear_int8: (x [...,K] float32, weight [N,blocks,block] uint8, scales [N,blocks] float32) -> [...,N].
// The definition is reference.py; the arithmetic is in loops.cc.
#include "format.h"

namespace xexport {
namespace {

const Registered<Linear<Int8>> registered;

}  // namespace
}  // namespace xexport
