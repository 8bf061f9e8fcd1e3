// The instruction sets that kernels are compiled for, and the one this processor has. A kernel's inner loops live in a
// header of their own, which its source includes once per set:
//
//   #define COMPRESSX_LOOPS "pattern_conv_loops.h"
//   #include "isa_each.h"       // namespaces generic, avx2, avx512, each with kLanes
//
// so that one library serves every machine and the choice is made at run time.

#pragma once

#include <cstdint>

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

namespace compressx {

enum Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

inline int BestIsa() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kGeneric;
}

inline int Lanes(int isa) { return isa == kAvx512 ? 16 : isa == kAvx2 ? 8 : 4; }

// A constant as a type: an array indexed by it can live in registers.
template <int I>
struct Constant {
  constexpr operator int() const { return I; }
};

}  // namespace compressx
