// The operators that the host's kernels cannot serve: making, moving and resizing tensors.

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/item.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "device.h"
#include "host.h"
#include "registering.h"
#include "runtime.h"

namespace drivetrain_sim {

namespace {

using at::IntArrayRef;
using at::Tensor;

// Making tensors ----------------------------------------------------------------------------------

at::ScalarType checked_dtype(std::optional<at::ScalarType> asked) {
  const auto dtype = c10::dtype_or_default(asked);
  TORCH_CHECK(
      dtype != at::kHalf || global_state().fp16,
      "The simulated device does not support torch.float16.");
  return dtype;
}

Tensor empty_memory_format(
    IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device> device, std::optional<bool>,
    std::optional<at::MemoryFormat> memory_format) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      c10::layout_or_default(layout) == c10::kStrided,
      "the simulated device has dense tensors only");
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(
      size, allocator(), c10::DispatchKeySet(device_key()), checked_dtype(dtype),
      memory_format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(
      size, stride, allocator(), c10::DispatchKeySet(device_key()),
      checked_dtype(dtype));
}

const Tensor& resize(
    const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat> memory_format) {
  const c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, memory_format);
}

Tensor& set_storage_at(
    Tensor& self, c10::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

Tensor& set_storage(Tensor& self, c10::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage_at(self, std::move(source), 0, {count}, {});
}

Tensor& set_empty(Tensor& self) {
  const c10::DeviceGuard guard(self.device());
  c10::Storage nothing(
      c10::Storage::use_byte_size_t(), 0, allocator()->allocate(0), allocator(), true);
  return set_storage_at(self, std::move(nothing), 0, {0}, {});
}

// Moving data -------------------------------------------------------------------------------------

void count_copy(const Tensor& from, const Tensor& to, bool non_blocking) {
  const auto bytes = static_cast<int64_t>(to.nbytes());
  if (!on_device(from)) {
    auto& state = device_state(to.device().index());
    ++state.uploads;
    state.uploaded_bytes += bytes;
    state.blocking_uploads += non_blocking ? 0 : 1;
  } else if (!on_device(to)) {
    const auto index = from.device().index();
    ++device_state(index).downloads;
    device_state(index).downloaded_bytes += bytes;
    if (!non_blocking) {
      synchronize(index);
    }
  } else {
    launch("aten::copy_", to.device().index());
    device_state(to.device().index()).device_copies += from.device() == to.device() ? 0 : 1;
  }
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  count_copy(self, to, non_blocking);
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  host_view(to).copy_(host_view(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (self.sizes() != to.sizes()) {
    to.resize_(self.sizes());
  }
  return copy_from(self, to, /*non_blocking=*/false);
}

at::Scalar read_number(const Tensor& self) {
  const auto index = self.device().index();
  ++device_state(index).downloads;
  device_state(index).downloaded_bytes += static_cast<int64_t>(self.itemsize());
  synchronize(index);
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  return host_view(self).item();
}

void record_stream(Tensor&, c10::Stream) {}

} // namespace

void register_tensors() {
  static torch::Library library = kernels_of("aten", device_key());
  library.impl("empty.memory_format", &empty_memory_format);
  library.impl("empty_strided", &empty_strided);
  library.impl("resize_", &resize);
  library.impl("set_.source_Storage_storage_offset", &set_storage_at);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Tensor", &at::native::set_tensor_);
  library.impl("set_", &set_empty);
  library.impl("view", &at::native::view);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &read_number);
  library.impl("record_stream", &record_stream);
}

// A copy resolves what is only marked as conjugated or negated; torch would do so by a copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

// For a process group, which moves bytes by itself and is no use of the host by the user.
TORCH_LIBRARY_FRAGMENT(drivetrain_sim, library) {
  library.def("host_view(Tensor tensor) -> Tensor", &host_view);
}

} // namespace drivetrain_sim
