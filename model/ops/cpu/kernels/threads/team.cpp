#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <system_error>
#include <thread>

#include "event.h"

namespace {

constexpr int64_t PATIENCE_NS = 20'000;  // and two pieces' time, before a piece is taken over
constexpr uint64_t SLICE_NS = 300'000;   // of processor time between turns of other processes
constexpr uint64_t RESET_ON_FORK = 1;    // SCHED_FLAG_RESET_ON_FORK

// A thread's state: the job's generation, the piece, and one of these.
enum : uint64_t { IDLE, COMPUTING, COMMITTED, REVOKED };
constexpr int STATE_BITS = 2, PIECE_BITS = 24;
constexpr int64_t MAX_PIECES = (1 << PIECE_BITS) - 1;

// One cache line each, which other threads' writes do not take away.
struct alignas(64) ThreadState {
  std::atomic<uint64_t> value{IDLE};
};
struct alignas(64) Counter {
  std::atomic<uint64_t> value{0};  // generation << PIECE_BITS | next piece
};

struct Team {
  Counter counters[MAX_NODES];  // the generation is odd while the job is written
  alignas(64) std::atomic<int64_t> unfinished{0};
  alignas(64) Event event;
  alignas(64) std::atomic<bool> in_use{false};
  std::atomic<int> leader{0};
  std::atomic<bool> in_sequence{false};
  bool (*run_next)(void*) = nullptr;
  void* sequence = nullptr;
  std::atomic<int> workers{0};
  Job job;
  ThreadState states[MAX_THREADS];
  // NUMA nodes and their CPUs: see getp_set_nodes. Changed while no job runs.
  int nodes = 1;
  std::atomic<uint32_t> placement{0};  // changes with the nodes
  cpu_set_t node_cpus[MAX_NODES];
};

// Never destroyed, since threads still wait for work when the process ends.
Team& team = *new Team;

thread_local int thread_index = 0;  // of any thread that is not one of the team's workers
thread_local int node = 0;
thread_local bool is_member = false;  // of the team that runs the current sequence
thread_local bool lost_lead = false;

// Asks for short turns on the core, which come sooner. Beside other processes a thread's turns last
// 3 ms by default, and so does the wait for the next one: many kernels' time. The share of the core
// stays the same. Linux before 6.12 ignores it.
void shorten_turns() {
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes;  // struct sched_attr of the kernel, its first version
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0)) return;
  if (attributes.policy != SCHED_OTHER) return;  // the runtime is another thing there
  attributes.runtime = SLICE_NS;
  // Processes that this thread starts have turns of their own. With a high priority they would
  // lose it as well.
  if (attributes.nice >= 0) attributes.flags |= RESET_ON_FORK;
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

uint64_t generation_of(uint64_t counter) { return counter >> PIECE_BITS; }
bool is_current(uint64_t generation) {
  return generation_of(team.counters[0].value.load(std::memory_order_acquire)) == generation;
}

// Takes a piece, of this thread's node if there is one. Returns -1 if no piece is left.
int64_t take_piece(const Job& job, uint64_t generation) {
  for (int i = 0; i < team.nodes; i++) {
    const int from = (node + i) % team.nodes;
    std::atomic<uint64_t>& counter = team.counters[from].value;
    uint64_t value = counter;
    while (generation_of(value) == generation) {
      const int64_t piece = value & ((1 << PIECE_BITS) - 1);
      if (piece >= job.node_ends[from]) break;
      if (counter.compare_exchange_weak(value, value + 1)) return piece;
    }
  }
  return -1;
}

// Computes a piece that this thread has taken. Returns whether no other thread took it over.
bool compute(const Job& job, uint64_t generation, int64_t index) {
  std::atomic<uint64_t>& state = team.states[thread_index].value;
  const uint64_t claim =
      generation << (PIECE_BITS + STATE_BITS) | (uint64_t)index << STATE_BITS | COMPUTING;
  const int64_t first = index * job.items_per_piece;
  Piece piece(first, std::min(job.items, first + job.items_per_piece),
              job.is_last ? &state : nullptr, claim);
  if (job.is_last) state = claim;
  job.run(job.captured, piece);
  const bool is_own = piece.commit();
  if (job.is_last) state = IDLE;
  // If the piece was taken over, another thread may wait until this one has finished reading.
  if (!is_own || --team.unfinished == 0) team.event.change();
  return is_own;
}

// Takes over a piece of another thread: returns its index, or -1 if there is none. `leads` becomes
// true if that thread led the sequence.
int64_t take_over(const Job& job, uint64_t generation, bool& leads) {
  for (int i = 0; i < job.threads; i++) {
    std::atomic<uint64_t>& state = team.states[i].value;
    uint64_t value = state;
    if (i == thread_index || value >> (PIECE_BITS + STATE_BITS) != generation) continue;
    if ((value & 3) != COMPUTING) continue;
    if (!state.compare_exchange_strong(value, value - COMPUTING + REVOKED)) continue;
    if (team.leader == i) {
      team.leader = thread_index;
      leads = true;
    }
    return (int64_t)(value >> STATE_BITS & ((1 << PIECE_BITS) - 1));
  }
  return -1;
}

// Works on the job of a generation until it is finished; a thread that does not lead also returns
// if nothing is left to do. Returns whether this thread leads at the end.
bool work_on(const Job& job, uint64_t generation, bool leads) {
  int64_t piece_ns = 0;
  auto run_piece = [&](int64_t piece) {
    const int64_t start = now();
    const bool is_own = compute(job, generation, piece);
    piece_ns = now() - start;
    if (leads && !is_own) {
      lost_lead = true;
      leads = false;
    }
    return is_own;
  };
  for (int64_t piece; (piece = take_piece(job, generation)) >= 0;)
    if (!run_piece(piece)) return false;
  int64_t start = now();
  while (is_current(generation) && team.unfinished.load(std::memory_order_acquire)) {
    pause();
    const bool can_take_over = job.is_last && team.in_sequence;
    const int64_t waited = now() - start, patience = PATIENCE_NS + 2 * piece_ns;
    if (can_take_over && waited > patience) {
      const int64_t piece = take_over(job, generation, leads);
      if (piece >= 0) {
        if (!run_piece(piece)) return false;
        start = now();
        continue;
      }
    }
    if (waited <= std::max(SPIN_NS, can_take_over ? patience : 0)) continue;
    if (!leads) return false;
    const uint32_t seen = team.event.current();
    if (team.unfinished) team.event.sleep_until_changed(seen);
    start = now();
  }
  return leads;
}

// Works on the team's job, if there is one for this thread. Returns whether this thread now leads.
bool help() {
  static thread_local Job job;
  static thread_local uint64_t copied = 1;
  const uint64_t generation = generation_of(team.counters[0].value);
  if (generation % 2 || !team.unfinished) return false;
  if (copied != generation) {
    // The job may be replaced while it is copied; the counter then tells.
    memcpy((void*)&job, (const void*)&team.job, offsetof(Job, captured));
    const size_t size = std::min((size_t)job.captured_size, sizeof job.captured);
    memcpy(job.captured, team.job.captured, size);
    std::atomic_thread_fence(std::memory_order_acquire);
    if (!is_current(generation)) return false;
    copied = generation;
  }
  return thread_index < job.threads && work_on(job, generation, false);
}

void lead_sequence() {
  lost_lead = false;
  while (team.run_next(team.sequence))
    if (lost_lead) return;
  team.in_sequence = false;
  team.event.change();
}

void run_worker(int index) {
  thread_index = index;
  is_member = true;
  shorten_turns();
  uint32_t placement = 0, seen = 0;
  for (;;) {
    if (placement != team.placement) {
      placement = team.placement;
      node = index % team.nodes;
      sched_setaffinity(0, sizeof(cpu_set_t), &team.node_cpus[node]);
    }
    if (help()) lead_sequence();
    team.event.wait_until_changed(seen);
    seen = team.event.current();
  }
}

// The node of the CPU that a thread runs on which is not a worker.
int current_node() {
  const int cpu = team.nodes > 1 ? sched_getcpu() : -1;
  for (int n = 0; cpu >= 0 && n < team.nodes; n++)
    if (CPU_ISSET(cpu, &team.node_cpus[n])) return n;
  return 0;
}

// Lets this thread be thread 0 of the team. Returns whether no other thread is.
bool enter() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    new (&team) Team;  // a forked process has none of the threads
  });
  (void)registered;
  if (team.in_use.exchange(true)) return false;
  static thread_local const bool has_short_turns = (shorten_turns(), true);
  (void)has_short_turns;
  node = current_node();
  return true;
}

void start_workers(int threads) {
  try {
    for (; team.workers < threads - 1; team.workers++)
      std::thread(run_worker, team.workers + 1).detach();
  } catch (const std::system_error&) {
    // The system permits no more threads: those that are there do all the work.
  }
}

}  // namespace

bool Piece::commit() {
  if (!state) return true;
  uint64_t expected = claim;
  return state->compare_exchange_strong(expected, claim - COMPUTING + COMMITTED) ||
         expected == claim - COMPUTING + COMMITTED;
}

bool in_sequence() { return is_member && team.in_sequence && team.leader == thread_index; }

void run_job(Job& job) {
  const bool is_in_sequence = in_sequence();
  if (!is_in_sequence && !enter()) {
    Piece all(0, job.items, nullptr, 0);  // another thread of the process uses the team
    return job.run(job.captured, all);
  }
  job.threads = std::min(job.threads, MAX_THREADS);
  start_workers(job.threads);
  job.items_per_piece = std::max(job.items_per_piece, job.items / MAX_PIECES);
  const int64_t pieces = (job.items + job.items_per_piece - 1) / job.items_per_piece;
  for (int n = 0; n < team.nodes; n++) job.node_ends[n] = pieces * (n + 1) / team.nodes;
  team.leader = thread_index;
  const uint64_t generation = generation_of(team.counters[0].value) + 2;
  for (int n = 0; n < team.nodes; n++) team.counters[n].value = (generation - 1) << PIECE_BITS;
  memcpy((void*)&team.job, (const void*)&job, offsetof(Job, captured));
  memcpy(team.job.captured, job.captured, (size_t)job.captured_size);
  team.unfinished = pieces;
  for (int n = team.nodes - 1; n >= 0; n--)
    team.counters[n].value = generation << PIECE_BITS | (n ? job.node_ends[n - 1] : 0);
  team.event.change();
  work_on(job, generation, true);
  if (!is_in_sequence) team.in_use = false;
}

void run_sequence(bool (*run_next)(void* state), void* state) {
  if (!enter()) {
    while (run_next(state)) continue;
    return;
  }
  is_member = true;
  team.run_next = run_next;
  team.sequence = state;
  team.leader = thread_index;
  team.in_sequence = true;
  lead_sequence();
  while (team.in_sequence) {
    const uint32_t seen = team.event.current();
    if (help()) lead_sequence();
    if (team.in_sequence) team.event.wait_until_changed(seen);
  }
  wait_for_late_threads();
  is_member = false;
  team.in_use = false;
}

void wait_for_late_threads() {
  for (int i = 0; i <= team.workers; i++)
    for (;;) {
      const uint32_t seen = team.event.current();
      if ((team.states[i].value & 3) != REVOKED || i == thread_index) break;
      team.event.wait_until_changed(seen);
    }
}

// Divides work among NUMA nodes, in equal parts. cpus [nodes, cpus_per_node] are the CPUs of each
// node, -1 for none; worker threads then stay on those of their node.
extern "C" void getp_set_nodes(const int32_t* cpus, int nodes, int cpus_per_node) {
  while (team.in_use.exchange(true)) std::this_thread::yield();
  team.nodes = std::clamp(nodes, 1, MAX_NODES);
  for (int n = 0; n < team.nodes; n++) {
    CPU_ZERO(&team.node_cpus[n]);
    for (int i = 0; i < cpus_per_node; i++)
      if (const int cpu = cpus[n * cpus_per_node + i]; cpu >= 0) CPU_SET(cpu, &team.node_cpus[n]);
  }
  const uint64_t generation = generation_of(team.counters[0].value);
  for (Counter& counter : team.counters) counter.value = generation << PIECE_BITS | MAX_PIECES;
  team.placement++;
  team.in_use = false;
}
