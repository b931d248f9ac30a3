#include "checks.h"

#include "runtime.h"

namespace drivetrain_sim {

void refuse_mixture(const std::string& name, c10::Device one, c10::Device other) {
  TORCH_CHECK(
      false, "Expected all tensors to be on the same device, but found at least two devices, ", one,
      " and ", other, "! (when calling ", name, ")");
}

c10::DeviceIndex launch_on(const char* name, std::initializer_list<at::Tensor> tensors) {
  const auto device = tensors.begin()->device();
  for (const auto& tensor : tensors) {
    if (tensor.defined() && tensor.device() != device) {
      refuse_mixture(name, device, tensor.device());
    }
  }
  launch(name, device.index());
  return device.index();
}

} // namespace drivetrain_sim
