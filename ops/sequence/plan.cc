#include "plan.h"

#include <algorithm>
#include <stdexcept>

namespace xexport {
namespace {

constexpr int64_t kMost = 4096;  // of anything

class Numbers {
 public:
  explicit Numbers(const std::vector<int64_t>& all) : all_(all) {}

  bool end() const { return at_ == all_.size(); }

  int64_t next(int64_t least, int64_t most) {
    if (end()) throw std::runtime_error("the attribute plan ends in the middle of a part");
    const int64_t value = all_[at_++];
    if (value < least || value > most) {
      throw std::runtime_error("the attribute plan has " + std::to_string(value) + " where " + std::to_string(least) +
                               " to " + std::to_string(most) + " is allowed");
    }
    return value;
  }

  size_t count(int64_t least) { return static_cast<size_t>(next(least, kMost)); }

 private:
  const std::vector<int64_t>& all_;
  size_t at_ = 0;
};

}  // namespace

SequencePlan::SequencePlan(const std::vector<int64_t>& numbers) {
  Numbers from(numbers);
  values = inputs = from.count(1);
  while (!from.end()) {
    SequencePart part;
    for (size_t n = from.count(1); n > 0; --n) part.op += static_cast<char>(from.next('0', 'z'));
    for (size_t n = from.count(1); n > 0; --n) {
      part.inputs.push_back(static_cast<size_t>(from.next(0, static_cast<int64_t>(values) - 1)));
    }
    for (size_t n = from.count(1); n > 0; --n, ++values) {
      const int64_t place = from.next(-kMost, kMost);
      part.places.push_back(place);
      if (place < 0) memories = std::max(memories, static_cast<size_t>(-place));
      if (place >= 0) outputs = std::max(outputs, static_cast<size_t>(place) + 1);
    }
    parts.push_back(std::move(part));
  }
  if (parts.empty()) throw std::runtime_error("the attribute plan has no parts");
}

}  // namespace xexport
