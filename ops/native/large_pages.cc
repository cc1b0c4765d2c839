#include "large_pages.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
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
// Memory must be free for so many copies.
constexpr size_t kTimesFree = 4;

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Bytes of memory that the system says are available; 0 if it doesn't say.
size_t available() {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    unsigned long kilobytes = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %lu kB", &kilobytes) == 1) return size_t{kilobytes} << 10;
  }
  return 0;
}

// Ranges of this process's memory that are private mappings of files.
std::vector<std::pair<uintptr_t, uintptr_t>> mapped_files() {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  std::ifstream file("/proc/self/maps");
  for (std::string line; std::getline(file, line);) {
    unsigned long first = 0, last = 0, offset = 0, inode = 0;
    char rights[5] = {}, device[16] = {};
    if (std::sscanf(line.c_str(), "%lx-%lx %4s %lx %15s %lu", &first, &last, rights, &offset, device, &inode) == 6 &&
        inode != 0 && rights[3] == 'p') {
      ranges.emplace_back(first, last);
    }
  }
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
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  return std::getline(file, modes) && modes.find("[never]") == std::string::npos;
}

LargePages::~LargePages() {
  if (memory_ != nullptr) munmap(memory_, bytes_);
}

void LargePages::hold(std::vector<Tensor>& constants) {
  size_t total = 0;
  for (const Tensor& t : constants) {
    if (t.data != nullptr) total += rounded(t.bytes(), kLine);
  }
  if (memory_ != nullptr || total < kPage || !large_pages_wanted() || available() / kTimesFree < total) return;
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
