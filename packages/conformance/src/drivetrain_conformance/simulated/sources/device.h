// What kernels need of the device: its memory and its random numbers.
#pragma once

#include <optional>

#include <ATen/core/Generator.h>
#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>

namespace drivetrain_sim {

// Allocates on the current device of the thread.
c10::Allocator* allocator();

// Host memory that a real device could read without waiting.
c10::Allocator* pinned_allocator();
bool is_pinned(const void* data);

at::Generator new_generator(c10::DeviceIndex index);
const at::Generator& default_generator(c10::DeviceIndex index); // -1 is the current device

// A storage of the device with another size and what was in it.
void resize_storage(const c10::Storage& storage, size_t bytes);

// The host's generator behind `asked`, or behind the default generator of the device.
at::Generator host_generator(const std::optional<at::Generator>& asked, c10::DeviceIndex index);

} // namespace drivetrain_sim
