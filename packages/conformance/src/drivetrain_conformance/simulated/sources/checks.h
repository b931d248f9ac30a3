// What several kernels check.
#pragma once

#include <initializer_list>
#include <string>

#include <ATen/core/Tensor.h>

namespace drivetrain_sim {

[[noreturn]] void refuse_mixture(const std::string& name, c10::Device one, c10::Device other);

// Count a kernel's launch on the device of its first tensor; all tensors must be there.
c10::DeviceIndex launch_on(const char* name, std::initializer_list<at::Tensor> tensors);

} // namespace drivetrain_sim
