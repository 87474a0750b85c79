// The threads of the library, and how a kernel's work is divided among them.
//
// A thread can be away from its core for milliseconds, because another process or the machine's
// host uses it, while a kernel takes tens of microseconds. Therefore no kernel waits for a certain
// thread to begin: the work is divided into pieces, and each thread that is there takes the next
// one from a counter. Where a thread goes away with a piece, another computes the piece instead
// (divide_last), and if that thread was leading a recorded step, also leads the rest of it
// (run_sequence). Threads without work spin for at most SPIN_NS and then sleep, so that they do not
// take the core from one that has work.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define HIDDEN __attribute__((visibility("hidden")))

constexpr int MAX_THREADS = 512;
constexpr int MAX_NODES = 16;

// Items [first, last) of a kernel's work, which one thread computes.
class HIDDEN Piece {
 public:
  Piece(int64_t begin, int64_t end, std::atomic<uint64_t>* thread_state, uint64_t own_claim)
      : first(begin), last(end), state(thread_state), claim(own_claim) {}

  // Whether this thread may write the results. If not, another thread computes the piece.
  bool commit();

  const int64_t first, last;

 private:
  std::atomic<uint64_t>* state;  // of the thread; null if no other thread can take the piece
  uint64_t claim;                // the state while no other thread has taken the piece
};

// A kernel's work. The function and what it captured are copied, since a thread that was away can
// begin with a piece after the kernel has returned; it then cannot commit.
struct Job {
  void (*run)(const void* captured, Piece& piece);
  int64_t items, items_per_piece, captured_size;
  int threads;
  bool is_last;
  int64_t node_ends[MAX_NODES];  // of the pieces that a NUMA node's threads take first
  alignas(16) char captured[320];
};

HIDDEN void run_job(Job& job);

// Calls run_next(state) until it returns false, on this thread or on one that took over from it.
// run_next notes in the state what comes next before it calls a kernel.
HIDDEN void run_sequence(bool (*run_next)(void* state), void* state);

// Whether the calling thread leads a sequence: only then can pieces of `divide_last` be taken over,
// as only then the memory that they read outlives the kernel.
HIDDEN bool in_sequence();

// Returns when no thread computes a piece that was taken from it. Until then it can read the
// memory of earlier kernels of the sequence.
HIDDEN void wait_for_late_threads();

namespace {

template <typename Body>
void divide_work(int threads, int64_t items, int64_t items_per_piece, bool is_last, Body body) {
  static_assert(sizeof body <= sizeof Job::captured && std::is_trivially_copyable_v<Body>,
                "the body of a parallel loop captures its variables by value");
  if (threads <= 1 || items <= items_per_piece) {
    Piece all(0, items, nullptr, 0);
    if (items > 0) body(all);
    return;
  }
  Job job;
  job.run = [](const void* captured, Piece& piece) { (*(const Body*)captured)(piece); };
  job.items = items;
  job.items_per_piece = items_per_piece;
  job.captured_size = sizeof body;
  job.threads = threads;
  job.is_last = is_last;
  memcpy(job.captured, (const void*)&body, sizeof body);
  run_job(job);
}

// Calls body(first, last) for pieces of [0, items), on up to `threads` threads.
template <typename Body>
void divide(int threads, int64_t items, int64_t items_per_piece, Body body) {
  divide_work(threads, items, items_per_piece, false,
              [body](Piece& piece) { body(piece.first, piece.last); });
}

// Calls body(piece) as `divide` does, as the last action of a kernel. In a sequence two threads can
// compute the same piece: `body` computes in memory of the thread, and only writes results after
// piece.commit() returned true.
template <typename Body>
void divide_last(int threads, int64_t items, int64_t items_per_piece, Body body) {
  divide_work(threads, items, items_per_piece, true, body);
}

}  // namespace
