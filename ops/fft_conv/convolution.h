// Causal convolutions of many rows: how they are computed, and the spectra that are kept.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "../native/node.h"
#include "plan.h"

namespace xexport {

// Rows (b, d) of `u` and `y` lie behind one another, `u_stride` and `y_stride` floats apart, and row d of the
// filter belongs to all of (., d). Outputs begin .. end - 1 are computed, from inputs 0 .. end - 1.
struct ConvolutionTask {
  const float* u;
  int64_t u_stride;
  const float* h;
  int64_t taps;
  float* y;
  int64_t y_stride;
  int64_t batch, channels, begin, end;
};

// Bytes of the spectra that are kept in this process.
int64_t spectrum_bytes();

class CausalConvolution {
 public:
  // A constant filter's spectra are kept between calls.
  CausalConvolution(Isa isa, bool constant);

  // Whether sums, an output each, are faster than transforms.
  bool is_direct(int64_t begin, int64_t end) const;
  // The outputs of one row, by sums.
  void direct(const ConvolutionTask& task, int64_t row) const;
  // All rows, by transforms.
  void transformed(const Call& call, const ConvolutionTask& task) const;

  // The same a group of rows at a time: as many channels as there are lanes.
  using Spectrum = std::shared_ptr<float>;
  struct Transform {
    std::shared_ptr<const Plan> plan;
    Spectrum spectrum;  // of all channels, or null: then every group makes its own
  };
  Transform transform(const Call& call, const ConvolutionTask& task) const;
  int64_t lanes() const { return loops_.lanes; }
  // Floats that `group` works in.
  int64_t scratch_size(const Transform& transform) const;
  // Channels group * lanes() ... of sequence `batch`, to `y`, whose rows lie task.y_stride apart.
  void group(const Transform& transform, const ConvolutionTask& task, int64_t batch, int64_t group, float* y,
             float* work) const;

 private:
  struct Kept {
    int64_t size;
    Spectrum spectrum;
  };

  void convolve(const Plan& plan, const ConvolutionTask& task, int64_t batch, int64_t group, const float* values,
                float* y, float* work) const;
  FilterRows filter(const ConvolutionTask& task, const Plan& plan, int64_t group) const;
  Spectrum kept(int64_t size) const;
  Spectrum keep(const Call& call, const ConvolutionTask& task, const Plan& plan) const;

  const ConvolutionLoops& loops_;
  bool constant_;
  mutable std::mutex mutex_;
  mutable std::vector<Kept> kept_;  // the latest used last
};

}  // namespace xexport
