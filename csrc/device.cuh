// Launching on a given device, and dividing a workspace: shared by the CUDA sources.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pudnet {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("pudnet._C: CUDA: ") + cudaGetErrorString(error));
}

// Makes a device current for the life of the object.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// Hands out aligned slices of the workspace; with a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(std::int64_t count) {
    const std::size_t at = size_;
    size_ += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }

  std::size_t size() const { return size_; }

 private:
  char* base_;
  std::size_t size_ = 0;
};

}  // namespace pudnet
