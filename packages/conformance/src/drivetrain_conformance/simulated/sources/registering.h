// What is registered with torch once it is known for which device type.
#pragma once

#include <torch/library.h>

namespace drivetrain_sim {

// Where kernels for one key are put. The library must live as long as they do.
inline torch::Library kernels_of(const char* operators, c10::DispatchKey key) {
  return torch::Library(torch::Library::IMPL, operators, key, __FILE__, __LINE__);
}

void register_device();
void register_tensors();
void register_fallback();
void register_accelerator_only();
void register_autocast();

} // namespace drivetrain_sim
