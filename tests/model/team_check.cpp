// Checks of kernels/threads: each is a mode of this program, which ends with 1 and a line if it
// fails. A check that waits for something that never happens does not end.
#include <sched.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "threads/team.h"

extern "C" void getp_set_nodes(const int32_t* cpus, int nodes, int cpus_per_node);

constexpr int CALLS = 40, ITEMS = 64;
std::atomic<int> written[CALLS][ITEMS], refused{0}, running{0}, begun[CALLS], led_by_others{0};
const std::thread::id main_thread = std::this_thread::get_id();
bool is_main() { return std::this_thread::get_id() == main_thread; }

void require(bool holds, const char* text) {
  if (holds) return;
  printf("failed: %s\n", text);
  fflush(stdout);
  _exit(1);
}

void require_each_written(int times) {
  for (auto& call : written)
    for (auto& item : call) require(item == times, "each item is written once");
}

struct Sequence {
  int next, threads;
  void (*on_piece)(int call);
};

bool run_next(void* state) {
  Sequence& sequence = *(Sequence*)state;
  if (sequence.next == CALLS) return false;
  const int call = sequence.next++;
  const auto on_piece = sequence.on_piece;
  if (!is_main()) led_by_others++;
  divide_last(sequence.threads, ITEMS, 3, [=](Piece& piece) {
    running++;
    begun[call]++;
    on_piece(call);
    if (piece.commit())
      for (int64_t i = piece.first; i < piece.last; i++) written[call][i]++;
    else
      refused++;
    running--;
  });
  return true;
}

void run(int threads, void (*on_piece)(int call)) {
  Sequence sequence{0, threads, on_piece};
  run_sequence(run_next, &sequence);
  require(running == 0, "no thread computes after the end of a sequence");
  require(!in_sequence(), "the sequence has ended");
}

// A thread that computes a piece of call 3 comes back only when call 4 has begun.
void leave_until_next_call() {
  while (!begun[4]) std::this_thread::yield();
}
void lose_worker(int call) {
  static std::atomic<bool> is_there{false};
  if (call != 3) return;
  if (is_main()) {
    while (!is_there) std::this_thread::yield();
  } else if (!is_there.exchange(true)) {
    leave_until_next_call();
  }
}
void lose_leader(int call) {
  static std::atomic<bool> is_there{false};
  if (call != 3) return;
  if (is_main()) {
    is_there = true;
    leave_until_next_call();
  } else {
    while (!is_there) std::this_thread::yield();
  }
}
void leave_at_random(int) {
  static thread_local unsigned seed = (unsigned)(uintptr_t)&seed;
  if (rand_r(&seed) % 50 == 0) usleep(rand_r(&seed) % 300);
}

void divide_by_two(int threads) {
  for (int call = 0; call < CALLS; call++)
    divide(threads, ITEMS, 3, [=](int64_t first, int64_t last) {
      for (; first < last; first++) written[call][first]++;
    });
}

void check_nodes() {
  cpu_set_t allowed, first_cpu;
  sched_getaffinity(0, sizeof allowed, &allowed);
  int cpus[2] = {-1, -1};
  for (int cpu = 0, found = 0; cpu < CPU_SETSIZE && found < 2; cpu++)
    if (CPU_ISSET(cpu, &allowed)) cpus[found++] = cpu;
  if (cpus[1] < 0) cpus[1] = cpus[0];
  CPU_ZERO(&first_cpu);
  CPU_SET(cpus[0], &first_cpu);
  sched_setaffinity(0, sizeof first_cpu, &first_cpu);
  const int32_t nodes[2] = {cpus[0], cpus[1]};
  getp_set_nodes(nodes, 2, 1);
  static std::atomic<int64_t> first_of_main{-1}, first_of_worker{-1};
  divide(2, ITEMS, 1, [](int64_t first, int64_t last) {
    auto& own = is_main() ? first_of_main : first_of_worker;
    if (own < 0) own = first;
    while (first_of_main < 0 || first_of_worker < 0) std::this_thread::yield();
    for (; first < last; first++) written[0][first]++;
  });
  require(first_of_main == 0, "a node's threads begin with its part");
  require(first_of_worker == ITEMS / 2, "the other node's threads begin with theirs");
  for (auto& item : written[0]) require(item == 1, "each item is computed once");
}

// The length of this thread's turns on a core in nanoseconds; 0 if it is the system's.
uint64_t turn_ns() {
  uint64_t attributes[6] = {};  // struct sched_attr; its runtime is the fourth
  syscall(SYS_sched_getattr, 0, attributes, sizeof attributes, 0);
  return attributes[3];
}

void check_turns() {
  static std::atomic<uint64_t> of_main{0}, of_worker{0};
  static std::atomic<bool> met_main{false}, met_worker{false};
  const uint64_t before = turn_ns();
  divide(2, ITEMS, 1, [](int64_t, int64_t) {
    (is_main() ? of_main : of_worker) = turn_ns();
    (is_main() ? met_main : met_worker) = true;
    while (!met_main || !met_worker) std::this_thread::yield();
  });
  require(of_main == of_worker, "both threads have turns of the same length");
  if (of_main != before) {
    const pid_t child = fork();
    if (!child) _exit(turn_ns() != before);
    int status = 1;
    waitpid(child, &status, 0);
    require(status == 0, "a process that is started has turns of the system's length");
  }
  if (of_main == before) printf("this system does not let a thread shorten its turns\n");
}

int main(int, char** arguments) {
  const std::string check = arguments[1];
  if (check == "worker") {
    run(2, lose_worker);
    require(refused >= 1, "the late thread may not write");
    require_each_written(1);
  } else if (check == "leader") {
    run(2, lose_leader);
    require(refused >= 1 && led_by_others > 0, "another thread leads");
    require_each_written(1);
  } else if (check == "random") {
    for (int i = 0; i < 50; i++) run(6, leave_at_random);
    require_each_written(50);
  } else if (check == "callers") {
    std::thread other([] { divide_by_two(2); });
    divide_by_two(2);
    other.join();
    require_each_written(2);
  } else if (check == "fork") {
    divide_by_two(2);
    const pid_t child = fork();
    divide_by_two(2);
    require_each_written(2);
    int status = 0;
    if (child) require(waitpid(child, &status, 0) == child && status == 0, "a forked process works");
  } else if (check == "turns") {
    check_turns();
  } else {
    check_nodes();
  }
}
