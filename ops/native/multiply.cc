#include "multiply.h"

#include <algorithm>
#include <thread>

namespace xexport {
namespace {

constexpr int64_t kTokensAtOnce = 1024;
constexpr int64_t kQuantizedAtOnce = 8;  // tokens
// Bytes of weights of a job, where they are what takes the time: its four streams are long enough for the
// processor to follow, and it is worth waking a thread.
constexpr double kJobBytes = 1 << 18, kLeastJobBytes = 1 << 15;
constexpr int64_t kManyJobs = 8;
constexpr int64_t kTokensOfTile = 96;

// As many jobs for each core, so that all end at the same time.
int64_t jobs_of(double bytes) {
  static const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  const auto most = static_cast<int64_t>(bytes / kLeastJobBytes);
  const int64_t rounds = 1 + static_cast<int64_t>(bytes / (kJobBytes * static_cast<double>(cores)));
  return std::max<int64_t>(1, std::min(cores * rounds, most));
}

// Floats of memory for a product's quantized activations: codes, scales and offsets.
size_t quantized_floats(const Multiplication& m) {
  if (m.loops->quantize == nullptr) return 0;
  const int64_t row = m.loops->row_bytes(m.task.blocks, m.task.block), numbers = m.task.tokens * m.task.blocks;
  return static_cast<size_t>((2 * numbers + (m.task.tokens * row + 3) / 4 + 15) / 16 * 16);
}

// Where they lie in that memory.
void place_quantized(const Multiplication& m, float* memory, Activations& to) {
  const int64_t row = m.loops->row_bytes(m.task.blocks, m.task.block), numbers = m.task.tokens * m.task.blocks;
  to = {reinterpret_cast<uint8_t*>(memory + 2 * numbers), row, memory, reinterpret_cast<int32_t*>(memory + numbers)};
}

void quantize(const Multiplication& m, int64_t begin, int64_t end) {
  const Product& p = m.task;
  for (int64_t t = begin; t < end; ++t) {
    m.loops->quantize(p.x + t * p.depth, p.depth, p.blocks, p.block,
                      const_cast<uint8_t*>(p.quantized.codes) + t * p.quantized.row_bytes,
                      const_cast<float*>(p.quantized.scales) + t * p.blocks,
                      const_cast<int32_t*>(p.quantized.offsets) + t * p.blocks);
  }
}

// Tokens of which each reads all weights: they bound the time, so they are read once, by all threads.
void few_tokens(const Call& call, const Multiplication* const* products, size_t count) {
  Multiplication all[kMostMultiplications];
  size_t floats = 0, room = 0;
  double bytes = 0, work = 0;
  for (size_t i = 0; i < count; ++i) {
    all[i] = *products[i];
    floats += quantized_floats(all[i]);
    room = std::max(room, static_cast<size_t>(all[i].loops->scratch(all[i].task)));
    bytes += all[i].bytes;
    work += all[i].bytes * static_cast<double>(all[i].task.tokens);
  }
  float* memory = floats > 0 ? scratch(floats, 1) : nullptr;
  for (size_t i = 0; i < count; ++i) {
    if (all[i].loops->quantize == nullptr) continue;
    const Multiplication* same = std::find_if(all, all + i, [&](const Multiplication& m) {
      return m.loops == all[i].loops && m.task.x == all[i].task.x && m.task.depth == all[i].task.depth &&
             m.task.block == all[i].task.block && m.task.tokens == all[i].task.tokens;
    });
    if (same != all + i) {
      all[i].task.quantized = same->task.quantized;
      continue;
    }
    place_quantized(all[i], memory, all[i].task.quantized);
    memory += quantized_floats(all[i]);
    quantize(all[i], 0, all[i].task.tokens);
  }
  const double jobs = static_cast<double>(jobs_of(bytes));
  int64_t steps[kMostMultiplications], ends[kMostMultiplications], end = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t group = all[i].loops->group, groups = (all[i].task.columns + group - 1) / group;
    const auto share = std::max<int64_t>(1, static_cast<int64_t>(jobs * all[i].bytes / bytes + 0.5));
    const int64_t at_once = (groups + share - 1) / share;
    steps[i] = at_once * group;
    ends[i] = end += (groups + at_once - 1) / at_once;
  }
  call.parallel(end, work, [&](int64_t job) {
    size_t i = 0;
    while (job >= ends[i]) ++i;
    const int64_t first = (job - (i > 0 ? ends[i - 1] : 0)) * steps[i];
    all[i].loops->rows(all[i].task, first, std::min(all[i].task.columns, first + steps[i]),
                       room > 0 ? scratch(room) : nullptr);
  });
}

// Weights unpacked once for a tile of tokens after the other.
void many_tokens(const Call& call, const Multiplication& m) {
  const Product& task = m.task;
  const auto room = static_cast<size_t>(m.loops->scratch(task));
  const int64_t panels = (task.columns + m.loops->panel - 1) / m.loops->panel;
  int64_t pieces = 1;
  if (panels < kManyJobs) pieces = std::max<int64_t>(1, std::min(kManyJobs / panels, task.tokens / kTokensOfTile));
  const int64_t piece = (task.tokens + pieces - 1) / pieces;
  const double work = static_cast<double>(task.tokens * task.depth) * static_cast<double>(task.columns) / 16;
  call.parallel(panels * pieces, work, [&](int64_t job) {
    const int64_t begin = job / panels * piece, end = std::min(task.tokens, begin + piece);
    if (begin < end) m.loops->tile(task, job % panels * m.loops->panel, begin, end, scratch(room));
  });
}

// A long prompt in parts whose activations stay in the cache while all weights pass by.
void in_parts(const Call& call, const Multiplication& whole) {
  Multiplication part = whole;
  for (int64_t t = 0; t < whole.task.tokens; t += kTokensAtOnce) {
    Product& task = part.task;
    task.tokens = std::min(kTokensAtOnce, whole.task.tokens - t);
    task.x = whole.task.x + t * task.depth;
    task.y = whole.task.y + t * task.columns;
    if (task.tokens < part.loops->many) {
      const Multiplication* only = &part;
      few_tokens(call, &only, 1);
      continue;
    }
    if (part.loops->quantize != nullptr) {
      place_quantized(part, scratch(quantized_floats(part), 1), task.quantized);
      const int64_t jobs = (task.tokens + kQuantizedAtOnce - 1) / kQuantizedAtOnce;
      call.parallel(jobs, static_cast<double>(task.tokens * task.depth), [&](int64_t job) {
        quantize(part, job * kQuantizedAtOnce, std::min(task.tokens, (job + 1) * kQuantizedAtOnce));
      });
    }
    many_tokens(call, part);
  }
}

}  // namespace

void multiply(const Call& call, Multiplication* products, size_t count) {
  const Multiplication* few[kMostMultiplications];
  size_t found = 0;
  for (size_t i = 0; i < count; ++i) {
    const Product& p = products[i].task;
    if (p.tokens == 0 || p.columns == 0) continue;
    if (p.tokens < products[i].loops->many) {
      few[found++] = &products[i];
    } else {
      in_parts(call, products[i]);
    }
  }
  if (found > 0) few_tokens(call, few, found);
}

}  // namespace xexport
