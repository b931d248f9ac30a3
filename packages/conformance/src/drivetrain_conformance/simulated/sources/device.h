// What kernels need of the device: its memory and its random numbers.
#pragma once

#include <optional>

#include <ATen/core/Generator.h>
#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>

namespace drivetrain_sim {

// Allocates on the current device of the thread.
c10::Allocator* allocator();

// A storage of the device with another size and what was in it.
void resize_storage(const c10::Storage& storage, size_t bytes);

// The host's generator behind `asked`, or behind the default generator of the device.
at::Generator host_generator(const std::optional<at::Generator>& asked, c10::DeviceIndex index);

} // namespace drivetrain_sim
