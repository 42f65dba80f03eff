// What the CUDA sources share with the rest of the module.
#pragma once

namespace pudnet {

// The newest CUDA version the installed driver supports, as 1000 * major + 10 * minor; 0 when there is no driver.
int cuda_driver_version();

}  // namespace pudnet
