// The C interface of the library: supported instruction sets, their functions, and replay of calls.
//
// Levels are numbered as in bindings.py: 1 AVX2 (other architectures: portable), 2 that with
// AVX-VNNI, 3 AVX-512 with VNNI, 4 that with BF16, 5 that with BF16 and AMX.

#include "table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

bool amx_enabled = false;

// Whether processor and operating system support a level. Requests permission to use AMX.
extern "C" int getp_has_level(int level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx, edx;
  const bool vnni = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) eax = 0;
  const bool has_avx_vnni = eax & (1u << 4), has_bf16 = eax & (1u << 5);
  switch (level) {
    case 1: return avx2;
    case 2: return avx2 && has_avx_vnni;
    case 3: return vnni;
    case 4: return vnni && has_bf16;
  }
  if (!vnni || !has_bf16 || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
  constexpr unsigned AMX = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  if ((edx & AMX) != AMX) return 0;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return level == 1;
#endif
}

// The fastest level of this processor, or 0.
extern "C" int getp_best_level() {
#if defined(__x86_64__)
  // Without AMX, Intel's processors multiply 16-bit integers up to four times as fast as bf16;
  // AMD's multiply both at the same rate.
  if (!getp_has_level(5) && getp_has_level(3) && __builtin_cpu_is("intel")) return 3;
#endif
  for (int level = 5; level > 0; level--)
    if (getp_has_level(level)) return level;
  return 0;
}

// The functions of a level that this processor supports. Only those of the latest call may be used:
// levels 4 and 5 share their functions.
extern "C" const Kernels* getp_kernels([[maybe_unused]] int level) {
#if defined(__x86_64__)
  amx_enabled = level == 5;
  switch (level) {
    case 1: return &avx2_kernels;
    case 2: return &avx_vnni_kernels;
    case 3: return &vnni_kernels;
  }
  return &avx512_kernels;
#else
  return &portable_kernels;
#endif
}

namespace {

struct Replay {
  const Function* functions;
  const int64_t *next, *end;
};

bool replay_next(void* state) {
  Replay& replay = *(Replay*)state;
  if (replay.next == replay.end) return false;
  const int64_t* call = replay.next;
  const Function& function = replay.functions[*call];
  replay.next += 1 + strlen(function.types);
  function.replay(call + 1);
  return true;
}

}  // namespace

// Repeats recorded calls: for each, the index of its function in the table, then its arguments.
extern "C" void getp_replay(const Kernels* kernels, const int64_t* calls, int64_t size) {
  Replay replay{kernels->functions, calls, calls + size};
  run_sequence(replay_next, &replay);
}
