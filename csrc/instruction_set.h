// Which vector code runs on this CPU. A file X_kernel.h holds vector code written once, for registers of PUDNET_LANES
// floats; X.cpp includes it through kernel_copies.h once per instruction set, each time in a namespace of its own and under
// a `#pragma GCC target`. Its functions may be called from OpenMP regions but contain none: an outlined region would lose the
// target.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#ifdef __SSE2__
#include <immintrin.h>
#endif

// Clang has no such pragma; there the compiler's own target decides (CXXFLAGS=-march=native), through the portable copy.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PUDNET_X86 1
#endif

namespace pudnet {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// The one called `name` ("avx512", "avx2", "portable"), or the best of this CPU for "". Throws std::invalid_argument where
// the CPU or the build lacks it.
InstructionSet choose_instruction_set(const std::string& name);

}  // namespace pudnet
