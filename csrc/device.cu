#include "device.h"

#include <cuda_runtime.h>

namespace pudnet {

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace pudnet
