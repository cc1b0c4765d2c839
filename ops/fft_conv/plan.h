// Sizes and tables of the transforms that loops.cc runs.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "loops.h"

namespace xexport {

// A transform of first * 2^k points. Its tables are computed in double precision:
//   twist[n] = e^(i pi n / (2 size))
//   odd[j, k - 1] = e^(-2 pi i j k / size), for the pass of radix `first`
//   levels[l][j, k - 1] = e^(-2 pi i j k / p), for the passes of radix 4 over blocks of p, p / 4 ... points
class Plan {
 public:
  // The smallest size of 2^k, 3 * 2^k or 5 * 2^k for `points`.
  static std::shared_ptr<const Plan> of(int64_t points);

  explicit Plan(int64_t size, int first);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  const PlanTables& tables() const { return tables_; }
  int64_t size() const { return tables_.size; }

 private:
  std::vector<float> twist_, odd_;
  std::vector<std::vector<float>> levels_;
  std::vector<const float*> pointers_;
  PlanTables tables_;
};

}  // namespace xexport
