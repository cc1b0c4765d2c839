// The session's threads, together for as long as a node runs that has several parts.
//
// A region of ONNX Runtime's threads costs some 5 us to begin and to end, and a layer of a decode step has five of
// them: products, between what only one thread can do. A team is one region for the whole node. One thread leads and
// computes; the others take jobs it shares, and while there are none they bring what it will read next into the
// caches that all cores share. So memory, which bounds a step, is read in the serial parts too.
//
// Progress never depends on a helper: whoever leads takes every job that nobody else has taken.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <vector>

#include "ort_abi.h"

namespace xexport {

// Memory that will be read, in pieces that a helper fetches at once.
class Ahead {
 public:
  // Adds a part's memory; a part that reads nothing large adds none.
  void add(const void* memory, size_t bytes);
  // Ends a part's list and begins the next one's; helpers, who take jobs from the back, fetch from the back.
  void end_part();

  // The first piece of a part, or of the next one that has any; of the part behind the last, count().
  size_t first(size_t part) const { return part == 0 ? 0 : ends_[part - 1]; }
  size_t count() const { return pieces_.size(); }
  size_t bytes() const { return bytes_; }
  void fetch(size_t piece) const;

 private:
  struct Piece {
    const char* memory;
    size_t bytes;
  };
  std::vector<Piece> pieces_;
  std::vector<size_t> ends_;
  size_t bytes_ = 0;
};

class Team {
 public:
  using Job = void (*)(void*, size_t);

  explicit Team(const Ahead& ahead) : ahead_(ahead) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Runs `body` on one thread of the session's, with the others as helpers; what it throws comes out here.
  template <class Body>
  void run(ort::KernelContext* context, Body&& body) {
    auto call = [](void* user) { (*static_cast<std::remove_reference_t<Body>*>(user))(); };
    run(context, call, &body);
  }

  // For the leader: job(0) .. job(count - 1), each once, on any thread of the team; they must not throw.
  void share(Job job, void* user, size_t count);

  // For the leader: from which part on it will read when it has done what it is about to do.
  void will_read(size_t part);

 private:
  static constexpr size_t kLine = 64;

  void run(ort::KernelContext* context, void (*body)(void*), void* user);
  void take_part();
  void lead();
  void help();
  bool take(bool from_front, size_t& job);
  void do_job(size_t job);
  bool fetch_ahead();

  const Ahead& ahead_;
  void (*body_)(void*) = nullptr;
  void* body_user_ = nullptr;
  std::exception_ptr error_;

  // What is shared at the moment; the leader writes it while no job is open.
  Job job_ = nullptr;
  void* user_ = nullptr;

  // The number of the sharing, and its jobs that nobody has taken: [front, back). One word, so that a helper that
  // looked before the present sharing began takes nothing.
  alignas(kLine) std::atomic<uint64_t> jobs_{0};
  alignas(kLine) std::atomic<size_t> open_{0};  // jobs that are not done
  alignas(kLine) std::atomic<size_t> next_piece_{0};
  std::atomic<size_t> last_piece_{0};
  alignas(kLine) std::atomic<bool> led_{false};
  std::atomic<bool> over_{false};
};

}  // namespace xexport
