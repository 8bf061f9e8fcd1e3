// Includes COMPRESSX_LOOPS once per instruction set. See isa.h.

namespace generic {
constexpr int kLanes = 4, kRegisters = 16;
#include COMPRESSX_LOOPS
}  // namespace generic

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kLanes = 8, kRegisters = 16;
#include COMPRESSX_LOOPS
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
namespace avx512 {
constexpr int kLanes = 16, kRegisters = 32;
#include COMPRESSX_LOOPS
}  // namespace avx512
#pragma GCC pop_options
#endif
