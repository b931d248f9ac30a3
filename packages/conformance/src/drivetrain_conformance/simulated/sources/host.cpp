#include "host.h"

#include <cstring>

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include "device.h"
#include "runtime.h"

namespace drivetrain_sim {
namespace {

// Another owner of the same memory, under the name of the host.
c10::Storage borrowed(const c10::Storage& storage) {
  auto* owner = new c10::Storage(storage);
  c10::DataPtr data(
      storage.mutable_data(), owner, [](void* context) {
        delete static_cast<c10::Storage*>(context);
      },
      c10::Device(c10::kCPU));
  return c10::Storage(
      c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(),
      /*resizable=*/true);
}

at::Tensor with_geometry_of(const at::Tensor& like, c10::Storage storage, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  impl->_set_conj(like.is_conj());
  impl->_set_neg(like.is_neg());
  return made;
}

} // namespace

at::Tensor host_view(const at::Tensor& tensor) {
  if (!on_device(tensor)) {
    return tensor;
  }
  return with_geometry_of(tensor, borrowed(tensor.storage()), c10::DispatchKey::CPU);
}

at::Tensor Call::to_host(const at::Tensor& tensor) {
  if (!on_device(tensor)) {
    return tensor;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      tensor.layout() == c10::kStrided, "the simulated device has dense tensors only, and this is ",
      tensor.layout());
  auto& host = host_of_[tensor.unsafeGetTensorImpl()];
  if (host.defined()) {
    return host;
  }
  host = with_geometry_of(tensor, host_storage(tensor.storage()), c10::DispatchKey::CPU);
  device_of_[host.unsafeGetTensorImpl()] = tensor;
  return host;
}

at::Tensor Call::to_device(const at::Tensor& result) {
  if (!result.defined() || on_device(result)) {
    return result;
  }
  const auto argument = device_of_.find(result.unsafeGetTensorImpl());
  if (argument != device_of_.end()) {
    return argument->second;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      result.layout() == c10::kStrided, "the simulated device has dense tensors only, and this is ",
      result.layout());
  return with_geometry_of(
      result, device_storage(result.storage()), device_key());
}

void Call::write_back() {
  for (const auto& [host, pair] : device_storages_) {
    const auto& device = pair.second;
    if (host->data() == device.data()) {
      continue;
    }
    // The kernel allocated: what it has now belongs to the device.
    const auto bytes = host->nbytes();
    auto data = adopt(host->set_data_ptr(c10::DataPtr()), bytes, index_);
    device.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    device.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  for (const auto& [impl, host] : host_of_) {
    if (host.sizes() == impl->sizes() && host.strides() == impl->strides() &&
        host.storage_offset() == impl->storage_offset()) {
      continue;
    }
    impl->set_storage_offset(host.storage_offset());
    impl->set_sizes_and_strides(host.sizes(), host.strides());
  }
}

c10::Storage Call::host_storage(const c10::Storage& storage) {
  auto& known = host_storages_[storage.unsafeGetStorageImpl()];
  if (!known) {
    known = borrowed(storage);
    device_storages_[known.unsafeGetStorageImpl()] = {known, storage};
  }
  return known;
}

c10::Storage Call::device_storage(const c10::Storage& storage) {
  const auto known = device_storages_.find(storage.unsafeGetStorageImpl());
  if (known != device_storages_.end()) {
    return known->second.second;
  }
  const auto bytes = storage.nbytes();
  c10::DataPtr data;
  if (storage.use_count() == 1) {
    // A new result, which nobody else holds: its memory becomes the device's as it is.
    data = adopt(storage.unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr()), bytes, index_);
  } else {
    data = allocate(bytes, index_);
    std::memcpy(data.get(), storage.data(), bytes);
  }
  c10::Storage made(
      c10::Storage::use_byte_size_t(), bytes, std::move(data), allocator(), /*resizable=*/true);
  device_storages_[storage.unsafeGetStorageImpl()] = {storage, made};
  return made;
}

} // namespace drivetrain_sim
