#include "large_pages.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace xexport {

#if defined(__linux__)

namespace {

constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kLine = 64;

// Calls line(text) for every line of a file of the system, until it says true; false if none did. (A stream of C++
// would add 800 KB to the library.)
template <class Line>
bool any_line(const char* path, Line&& line) {
  std::FILE* file = std::fopen(path, "r");
  if (file == nullptr) return false;
  char text[4608];  // a path and what stands before it
  bool found = false;
  while (!found && std::fgets(text, sizeof(text), file) != nullptr) found = line(text);
  std::fclose(file);
  return found;
}

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Whether so many bytes can be copied and at least half of the machine's memory stays available.
bool plenty(size_t bytes) {
  unsigned long total = 0, available = 0;  // kilobytes
  any_line("/proc/meminfo", [&](const char* line) {
    std::sscanf(line, "MemTotal: %lu kB", &total);
    return std::sscanf(line, "MemAvailable: %lu kB", &available) == 1;
  });
  return available > total / 2 + (bytes >> 10);
}

// Ranges of this process's memory that are private mappings of files.
std::vector<std::pair<uintptr_t, uintptr_t>> mapped_files() {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  any_line("/proc/self/maps", [&](const char* line) {
    unsigned long first = 0, last = 0, inode = 0;
    char rights[5] = {};
    const int read = std::sscanf(line, "%lx-%lx %4s %*x %*15s %lu", &first, &last, rights, &inode);
    if (read == 4 && inode != 0 && rights[3] == 'p') ranges.emplace_back(first, last);
    return false;
  });
  return ranges;
}

// Takes the copied pages out of this process's memory. They are read from the file again if anybody asks, so only
// pages of a file may go: others would come back as zeros.
void give_back(const std::vector<Tensor>& originals) {
  const auto small = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto files = mapped_files();
  for (const Tensor& t : originals) {
    const auto at = reinterpret_cast<uintptr_t>(t.data);
    const uintptr_t first = (at + small - 1) / small * small, last = (at + t.bytes()) / small * small;
    const bool whole = std::any_of(files.begin(), files.end(),
                                   [&](const auto& range) { return range.first <= first && last <= range.second; });
    if (first < last && whole) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  }
}

}  // namespace

bool large_pages_wanted() {
  const char* said = std::getenv("XEXPORT_LARGE_PAGES");
  if (said != nullptr && std::strcmp(said, "0") == 0) return false;
  return any_line("/sys/kernel/mm/transparent_hugepage/enabled",
                  [](const char* line) { return std::strstr(line, "[never]") == nullptr; });
}

LargePages::~LargePages() {
  if (memory_ != nullptr) munmap(memory_, bytes_);
}

void LargePages::hold(std::vector<Tensor>& constants) {
  size_t total = 0;
  for (const Tensor& t : constants) {
    if (t.data != nullptr) total += rounded(t.bytes(), kLine);
  }
  if (memory_ != nullptr || total < kPage || !large_pages_wanted() || !plenty(total)) return;
  bytes_ = rounded(total, kPage) + kPage;  // a large page begins at a multiple of its size
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return;
  memory_ = memory;
  char* at = reinterpret_cast<char*>(rounded(reinterpret_cast<uintptr_t>(memory), kPage));
  // whole pages only: the last one, partly filled, would take a large page's memory
  madvise(at, total / kPage * kPage, MADV_HUGEPAGE);
  std::vector<Tensor> originals;
  for (Tensor& t : constants) {
    if (t.data == nullptr || t.bytes() == 0) continue;
    originals.push_back(t);
    t.data = std::memcpy(at, t.data, t.bytes());
    at += rounded(t.bytes(), kLine);
  }
  give_back(originals);
}

#else

bool large_pages_wanted() { return false; }
LargePages::~LargePages() = default;
void LargePages::hold(std::vector<Tensor>&) {}

#endif

}  // namespace xexport
