// xexport::linear_int6x8: (x [...,K] float32, weight [groups,blocks,6,8,4] uint8, scales [groups,blocks,8] float16)
// -> [...,N] float32, where a group is eight rows of weights. The definition is reference.py; the arithmetic is in
// loops.cc.
#include "format.h"

namespace xexport {
namespace {

const Registered<Linear<Int6>> registered;

}  // namespace
}  // namespace xexport
