// Memory for intermediate results, which a thread keeps between calls.
#pragma once

#include "types.h"

namespace {

// At least `count` uninitialized values, aligned to a cache line, for the calling thread alone.
template <typename T>
INLINE T* thread_scratch(int64_t count) {
  static thread_local std::vector<T> scratch;
  if ((int64_t)scratch.size() < count + 64) scratch.resize((size_t)count + 64);
  return (T*)(((uintptr_t)scratch.data() + 63) & ~(uintptr_t)63);
}

// The same for values that the calling thread shares with its team. Scratches of different `index`
// (0 to 2) are in use at the same time.
template <typename T>
INLINE T* shared_scratch(int index, int64_t count) {
  static thread_local std::vector<T> scratches[3];
  std::vector<T>& scratch = scratches[index];
  if ((int64_t)scratch.size() < count + 64) {
    wait_for_late_threads();  // which may still read the memory that is freed
    scratch.resize((size_t)count + 64);
  }
  return (T*)(((uintptr_t)scratch.data() + 63) & ~(uintptr_t)63);
}

}  // namespace
