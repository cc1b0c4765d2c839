// Constant weights in large pages.
//
// A step reads every weight once, so a processor walks its page tables for each 4 KB: with pages of 2 MB a step takes
// 3-6% less (docs/performance.md). Weights are mapped from the bundle's file, whose pages Linux keeps small, so they
// are copied into memory that asks for large ones, and the mapped pages are given back. They are copied only where
// Linux lets a process ask, and while half of the machine's memory is available. XEXPORT_LARGE_PAGES=0 leaves the
// weights in the file's pages, which processes share and the system may drop when memory is short.
#pragma once

#include <vector>

#include "node.h"

namespace xexport {

// Whether this process asks for them and the system allows that.
bool large_pages_wanted();

class LargePages {
 public:
  LargePages() = default;
  LargePages(const LargePages&) = delete;
  LargePages& operator=(const LargePages&) = delete;
  ~LargePages();

  // Copies these tensors and points them at their copies, which live as long as this object; or leaves all as they
  // are. Those without data are left out.
  void hold(std::vector<Tensor>& constants);

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace xexport
