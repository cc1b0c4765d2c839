#include "convolution.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>

namespace xexport {
namespace {

constexpr size_t kSpectraOfAFilter = 2;  // of different sizes: a prompt's and the whole filter's

// Bytes that spectra may take in this process: a quarter of the machine's memory, 1 GB at most;
// XEXPORT_SPECTRUM_MB says otherwise.
int64_t limit() {
  static const int64_t bytes = []() -> int64_t {
    constexpr int64_t kMegabyte = int64_t{1} << 20;
    if (const char* text = std::getenv("XEXPORT_SPECTRUM_MB")) return std::atoll(text) * kMegabyte;
    const auto memory = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
    return std::min(memory / 4, 1024 * kMegabyte);
  }();
  return bytes;
}

std::atomic<int64_t>& in_use() {
  static std::atomic<int64_t> bytes{0};
  return bytes;
}

// Memory counted against the limit, or null if there is none left.
std::shared_ptr<float> reserve(int64_t floats) {
  const int64_t bytes = (floats * 4 + 63) / 64 * 64;
  if (in_use().fetch_add(bytes) + bytes <= limit()) {
    if (auto* memory = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(bytes)))) {
      return {memory, [bytes](float* p) {
                std::free(p);
                in_use() -= bytes;
              }};
    }
  }
  in_use() -= bytes;
  return nullptr;
}

}  // namespace

int64_t spectrum_bytes() { return in_use().load(); }

CausalConvolution::CausalConvolution(Isa isa, bool constant) : loops_(convolution_loops(isa)), constant_(constant) {}

bool CausalConvolution::is_direct(int64_t begin, int64_t end) const {
  // cycles of one row, measured: 1.2 for each vector of products, 1.6 for each point and factor 2
  const double products = static_cast<double>(end - begin) * static_cast<double>(begin + end) / 2;
  const double sums = 1.2 * products / loops_.lanes + 20.0 * static_cast<double>(end - begin);
  const double transforms = constant_ ? 2 : 3;
  const double points = static_cast<double>(end);
  return sums <= transforms * 1.6 * points * std::log2(points + 1) / loops_.lanes + 40 * transforms;
}

void CausalConvolution::direct(const ConvolutionTask& task, int64_t row) const {
  const float* u = task.u + row * task.u_stride;
  const float* h = task.h + row % task.channels * task.taps;
  float* y = task.y + row * task.y_stride;
  for (int64_t t = task.begin; t < task.end; ++t) y[t - task.begin] = loops_.output(u, h, t);
}

FilterRows CausalConvolution::filter(const ConvolutionTask& task, const Plan& plan, int64_t group) const {
  const int64_t first = group * loops_.lanes;
  return {task.h + first * task.taps, task.taps, std::min(task.taps, plan.size()),
          std::min<int64_t>(loops_.lanes, task.channels - first)};
}

CausalConvolution::Transform CausalConvolution::transform(const Call& call, const ConvolutionTask& task) const {
  auto plan = Plan::of(task.end);
  return {plan, constant_ ? keep(call, task, *plan) : nullptr};
}

int64_t CausalConvolution::scratch_size(const Transform& transform) const {
  return transform.plan->size() * 2 * loops_.lanes * (transform.spectrum ? 1 : 2);
}

void CausalConvolution::convolve(const Plan& plan, const ConvolutionTask& task, int64_t batch, int64_t group,
                                 const float* values, float* y, float* work) const {
  const int64_t first = group * loops_.lanes;
  const SignalRows rows = {task.u + (batch * task.channels + first) * task.u_stride,
                           task.u_stride,
                           task.end,
                           std::min<int64_t>(loops_.lanes, task.channels - first),
                           y,
                           task.y_stride,
                           task.begin};
  loops_.convolve(plan.tables(), rows, values, work);
}

void CausalConvolution::group(const Transform& transform, const ConvolutionTask& task, int64_t batch, int64_t group,
                              float* y, float* work) const {
  const Plan& plan = *transform.plan;
  const int64_t floats = plan.size() * 2 * loops_.lanes;
  if (transform.spectrum) {
    convolve(plan, task, batch, group, transform.spectrum.get() + group * floats, y, work);
    return;
  }
  loops_.transform(plan.tables(), filter(task, plan, group), work);
  convolve(plan, task, batch, group, work, y, work + floats);
}

void CausalConvolution::transformed(const Call& call, const ConvolutionTask& task) const {
  const Transform how = transform(call, task);
  const int64_t lanes = loops_.lanes, groups = (task.channels + lanes - 1) / lanes;
  const auto row = [&](int64_t b, int64_t g) { return task.y + (b * task.channels + g * lanes) * task.y_stride; };
  const auto floats = static_cast<size_t>(scratch_size(how));
  const double work = static_cast<double>(task.batch * task.channels) * static_cast<double>(task.end) * 20;
  if (how.spectrum) {
    call.parallel(task.batch * groups, work, [&](int64_t unit) {
      const int64_t b = unit / groups, g = unit % groups;
      group(how, task, b, g, row(b, g), scratch(floats));
    });
    return;
  }
  // the sequences of a batch share a group's spectrum
  call.parallel(groups, 2 * work, [&](int64_t g) {
    float* values = scratch(floats);
    loops_.transform(how.plan->tables(), filter(task, *how.plan, g), values);
    for (int64_t b = 0; b < task.batch; ++b) {
      convolve(*how.plan, task, b, g, values, row(b, g), values + how.plan->size() * 2 * lanes);
    }
  });
}

CausalConvolution::Spectrum CausalConvolution::kept(int64_t size) const {
  for (size_t i = 0; i < kept_.size(); ++i) {
    if (kept_[i].size != size) continue;
    std::rotate(kept_.begin() + static_cast<std::ptrdiff_t>(i), kept_.begin() + static_cast<std::ptrdiff_t>(i) + 1,
                kept_.end());
    return kept_.back().spectrum;
  }
  return nullptr;
}

CausalConvolution::Spectrum CausalConvolution::keep(const Call& call, const ConvolutionTask& task,
                                                    const Plan& plan) const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (Spectrum spectrum = kept(plan.size())) return spectrum;
    if (kept_.size() >= kSpectraOfAFilter) kept_.erase(kept_.begin());
  }
  const int64_t lanes = loops_.lanes, groups = (task.channels + lanes - 1) / lanes;
  const int64_t floats = plan.size() * 2 * lanes;
  Spectrum spectrum = reserve(groups * floats);
  if (!spectrum) return nullptr;
  const double work = static_cast<double>(task.channels) * static_cast<double>(plan.size()) * 10;
  call.parallel(groups, work, [&](int64_t group) {
    loops_.transform(plan.tables(), filter(task, plan, group), spectrum.get() + group * floats);
  });
  const std::lock_guard<std::mutex> lock(mutex_);
  if (Spectrum earlier = kept(plan.size())) return earlier;  // another call was faster
  if (kept_.size() < kSpectraOfAFilter) kept_.push_back({plan.size(), spectrum});
  return spectrum;
}

}  // namespace xexport
