#include "plan.h"

#include <cmath>
#include <map>
#include <mutex>

namespace xexport {
namespace {

const double kPi = std::acos(-1.0);

// e^(-2 pi i j k / size) for j < size / radix and k = 1 .. radix - 1.
std::vector<float> twiddles(int64_t size, int radix) {
  std::vector<float> table;
  table.reserve(static_cast<size_t>(size / radix * (radix - 1) * 2));
  for (int64_t j = 0; j < size / radix; ++j) {
    for (int k = 1; k < radix; ++k) {
      const double angle = -2 * kPi * static_cast<double>(j * k) / static_cast<double>(size);
      table.push_back(static_cast<float>(std::cos(angle)));
      table.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  return table;
}

}  // namespace

Plan::Plan(int64_t size, int first) {
  for (int64_t n = 0; n < size; ++n) {
    const double angle = kPi * static_cast<double>(n) / static_cast<double>(2 * size);
    twist_.push_back(static_cast<float>(std::cos(angle)));
    twist_.push_back(static_cast<float>(std::sin(angle)));
  }
  if (first > 1) odd_ = twiddles(size, first);
  for (int64_t block = size / first; block >= 8; block /= 4) levels_.push_back(twiddles(block, 4));
  for (const auto& level : levels_) pointers_.push_back(level.data());
  tables_ = {size, first, twist_.data(), odd_.data(), pointers_.data()};
}

// Plans are kept for good: four sizes an octave, 16 bytes a point each.
std::shared_ptr<const Plan> Plan::of(int64_t points) {
  int64_t size = 1;
  int first = 1;
  while (size < points) size *= 2;
  for (int odd : {3, 5}) {
    int64_t other = odd;
    while (other < points) other *= 2;
    if (other < size) {
      size = other;
      first = odd;
    }
  }
  static std::mutex mutex;
  static std::map<int64_t, std::shared_ptr<const Plan>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& plan = plans[size];
  if (!plan) plan = std::make_shared<const Plan>(size, first);
  return plan;
}

}  // namespace xexport
