// xexport::linear: (x [...,K] float32, weight [N,K] float32 or float16) -> [...,N] float32.
// The definition is reference.py; the arithmetic is in loops.cc.
#include "format.h"

namespace xexport {
namespace {

using ort::Element;

const Registered<Linear<Float<Element::f32>>> registered_f32;
const Registered<Linear<Float<Element::f16>>> registered_f16;

}  // namespace
}  // namespace xexport
