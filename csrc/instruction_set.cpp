#include "instruction_set.h"

#include <stdexcept>

namespace pudnet {

InstructionSet choose_instruction_set(const std::string& name) {
  bool avx2 = false, avx512 = false;
#ifdef PUDNET_X86
  avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  if (avx512 && (name.empty() || name == "avx512")) return InstructionSet::kAvx512;
  if (avx2 && (name.empty() || name == "avx2")) return InstructionSet::kAvx2;
  if (name.empty() || name == "portable") return InstructionSet::kPortable;
  const std::string usable = std::string("portable") + (avx2 ? ", avx2" : "") + (avx512 ? ", avx512" : "");
  throw std::invalid_argument("instruction_set must be one of " + usable + " on this machine; got '" + name + "'.");
}

}  // namespace pudnet
