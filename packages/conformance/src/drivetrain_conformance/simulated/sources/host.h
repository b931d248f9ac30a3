// Tensors of the host that share the memory of the device's, so that the host's kernels can be
// the device's kernels.
#pragma once

#include <unordered_map>
#include <utility>

#include <ATen/core/Tensor.h>

#include "runtime.h"

namespace drivetrain_sim {

inline bool on_device(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == device_type();
}

// The tensors of one call of a kernel, and the way back from its results.
class Call {
 public:
  explicit Call(c10::DeviceIndex index) : index_(index) {}

  // The host's view of a tensor; the same one each time. Others are returned as they are.
  at::Tensor to_host(const at::Tensor& tensor);

  // The device's tensor for a result: the argument that it is, a view of one, or a new tensor.
  at::Tensor to_device(const at::Tensor& result);

  // Kernels may resize what they write to. Bring the arguments up to date.
  void write_back();

 private:
  c10::Storage host_storage(const c10::Storage& storage);
  c10::Storage device_storage(const c10::Storage& storage);

  c10::DeviceIndex index_;
  std::unordered_map<c10::TensorImpl*, at::Tensor> host_of_; // by the device's tensor
  std::unordered_map<c10::TensorImpl*, at::Tensor> device_of_; // by the host's
  std::unordered_map<c10::StorageImpl*, c10::Storage> host_storages_; // by the device's
  // By the host's, which is kept: another at the address of one that is gone would be taken for it.
  std::unordered_map<c10::StorageImpl*, std::pair<c10::Storage, c10::Storage>> device_storages_;
};

// Outside of a call: a tensor of the host that keeps the device's memory alive.
at::Tensor host_view(const at::Tensor& tensor);

} // namespace drivetrain_sim
