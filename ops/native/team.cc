#include "team.h"

#include <algorithm>
#include <thread>

#include "node.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xexport {
namespace {

// Bytes fetched at once: a job that is shared meanwhile waits for no more than that, about a microsecond.
constexpr size_t kPiece = 16384;
// Pieces that are fetched before they are read: what caches hold of them for so long.
constexpr size_t kMostPieces = 64;
constexpr size_t kCacheLine = 64;
// Turns that a thread waits without giving its core away, about 50 us, and that a helper waits for a leader.
constexpr int kTurns = 1000;

constexpr int kBits = 20;  // of front and back
constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
constexpr size_t kMostJobs = kMask;

uint64_t front_of(uint64_t jobs) { return jobs >> kBits & kMask; }
uint64_t back_of(uint64_t jobs) { return jobs & kMask; }

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

void wait(int& turn) {
  if (++turn < kTurns) {
    pause();
  } else {
    std::this_thread::yield();
  }
}

size_t threads_at_most() {
  static const size_t cores = std::max<size_t>(1, std::thread::hardware_concurrency());
  return cores;
}

}  // namespace

void Ahead::add(const void* memory, size_t bytes) {
  const char* at = static_cast<const char*>(memory);
  bytes_ += bytes;
  for (size_t i = 0; i < bytes; i += kPiece) pieces_.push_back({at + i, std::min(kPiece, bytes - i)});
}

void Ahead::end_part() {
  std::reverse(pieces_.begin() + static_cast<std::ptrdiff_t>(first(ends_.size())), pieces_.end());
  ends_.push_back(pieces_.size());
}

void Ahead::fetch(size_t piece) const {
  const Piece& p = pieces_[piece];
  for (size_t i = 0; i < p.bytes; i += kCacheLine) __builtin_prefetch(p.memory + i, 0, 2);
}

void Team::run(ort::KernelContext* context, void (*body)(void*), void* user) {
  body_ = body;
  body_user_ = user;
  check(ort::kParallelFor(api(), context, [](void* team, size_t) { static_cast<Team*>(team)->take_part(); },
                          threads_at_most(), 0, this));
  if (error_) std::rethrow_exception(error_);
}

// Whoever comes first leads.
void Team::take_part() {
  if (led_.exchange(true, std::memory_order_acq_rel)) {
    help();
  } else {
    lead();
  }
}

void Team::lead() {
  try {
    body_(body_user_);
  } catch (...) {
    error_ = std::current_exception();
  }
  over_.store(true, std::memory_order_release);
}

void Team::help() {
  size_t job = 0;
  for (int turn = 0; !over_.load(std::memory_order_acquire);) {
    if (take(false, job)) {
      do_job(job);
      turn = 0;
    } else if (!fetch_ahead()) {
      wait(turn);
    }
  }
}

// The leader takes from the front and helpers from the back, where their caches have what they fetched ahead: so each
// passes through memory of its own.
bool Team::take(bool from_front, size_t& job) {
  uint64_t jobs = jobs_.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t front = front_of(jobs), back = back_of(jobs);
    if (front >= back) return false;
    const uint64_t left = from_front ? jobs + (uint64_t{1} << kBits) : jobs - 1;
    if (jobs_.compare_exchange_weak(jobs, left, std::memory_order_acq_rel, std::memory_order_acquire)) {
      job = from_front ? front : back - 1;
      return true;
    }
  }
}

void Team::do_job(size_t job) {
  job_(user_, job);
  open_.fetch_sub(1, std::memory_order_release);
}

bool Team::fetch_ahead() {
  if (next_piece_.load(std::memory_order_relaxed) >= last_piece_.load(std::memory_order_relaxed)) return false;
  const size_t piece = next_piece_.fetch_add(1, std::memory_order_relaxed);
  if (piece >= last_piece_.load(std::memory_order_relaxed)) return false;
  ahead_.fetch(piece);
  return true;
}

void Team::will_read(size_t part) {
  const size_t first = std::max(ahead_.first(part), next_piece_.load(std::memory_order_relaxed));
  last_piece_.store(0, std::memory_order_relaxed);  // a helper that reads only one of them fetches nothing
  next_piece_.store(first, std::memory_order_relaxed);
  last_piece_.store(std::min(ahead_.count(), ahead_.first(part) + kMostPieces), std::memory_order_relaxed);
}

void Team::share(Job job, void* user, size_t count) {
  if (count > kMostJobs) {  // each of fewer jobs does several
    struct Several {
      Job job;
      void* user;
      size_t count, at_once;
    } several{job, user, count, (count + kMostJobs - 1) / kMostJobs};
    const auto run = [](void* s, size_t i) {
      const auto& all = *static_cast<Several*>(s);
      const size_t end = std::min(all.count, (i + 1) * all.at_once);
      for (size_t k = i * all.at_once; k < end; ++k) all.job(all.user, k);
    };
    share(run, &several, (count + several.at_once - 1) / several.at_once);
    return;
  }
  job_ = job;
  user_ = user;
  open_.store(count, std::memory_order_relaxed);
  const uint64_t sharing = (jobs_.load(std::memory_order_relaxed) >> 2 * kBits) + 1;
  jobs_.store(sharing << 2 * kBits | count, std::memory_order_release);
  size_t mine = 0;
  while (take(true, mine)) do_job(mine);
  for (int turn = 0; open_.load(std::memory_order_acquire) > 0;) wait(turn);
}

}  // namespace xexport
