// How a thread waits for others: it spins for a short time, then it sleeps.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace {

constexpr int64_t SPIN_NS = 50'000;  // before a thread without work sleeps

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000ll + time.tv_nsec;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A number that changes when waiting threads should look again.
class Event {
 public:
  uint32_t current() const { return value.load(); }

  void change() {
    value++;
    if (sleepers) syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  // Returns when the number is no longer `seen`.
  void sleep_until_changed(uint32_t seen) {
    sleepers++;
    while (value == seen)
      syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    sleepers--;
  }
  void wait_until_changed(uint32_t seen) {
    const int64_t end = now() + SPIN_NS;
    do {
      for (int i = 0; i < 32; i++, pause())
        if (value.load(std::memory_order_acquire) != seen) return;
    } while (now() < end);
    sleep_until_changed(seen);
  }

 private:
  std::atomic<uint32_t> value{0}, sleepers{0};
};

}  // namespace
