// The state of the simulated devices: options, counters, memory. Knows nothing of tensors.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/DispatchKey.h>

namespace drivetrain_sim {

// More are never needed, and a fixed number keeps every counter free of locks.
constexpr int kMaxDevices = 16;

// The device type that this library serves in this process, and what torch dispatches it by. Chosen
// once, before anything is registered: torch's type for others, or one of its own that has a name
// there and no kernels.
c10::DeviceType device_type();
c10::DispatchKey device_key();
c10::DispatchKey autocast_key();

// Read from any thread (autograd has one per device), written from Python.
using Number = std::atomic<int64_t>;

struct DeviceState {
  // Options. A limit of 0 means none; launches are counted down, so 0 means "never fails".
  Number memory_limit{0};
  Number launches_until_failure{0};
  Number failed{0};
  // Counters.
  Number launches{0};
  Number uploads{0};
  Number uploaded_bytes{0};
  Number blocking_uploads{0};
  Number downloads{0};
  Number downloaded_bytes{0};
  Number device_copies{0};
  Number synchronizations{0};
  Number out_of_memory{0};
  // Memory, in bytes.
  Number allocated{0};
  Number peak{0};
};

struct GlobalState {
  Number devices{1};
  Number latency_ns{0};
  Number fp16{1};
  Number inference_mode{1};
  Number inplace{1};
};

DeviceState& device_state(c10::DeviceIndex index);
GlobalState& global_state();

// The device that this thread is on: every thread has its own.
c10::DeviceIndex current_device();
void set_current_device(c10::DeviceIndex index);

// Host memory that counts as memory of a device. Throws c10::OutOfMemoryError above the limit.
c10::DataPtr allocate(size_t bytes, c10::DeviceIndex index);
c10::DataPtr adopt(c10::DataPtr host, size_t bytes, c10::DeviceIndex index);

// What every kernel does first: count, wait, and fail if it is time to.
void launch(const char* kernel, c10::DeviceIndex index);

// The host waits for the device. Also fails if the device has failed.
void synchronize(c10::DeviceIndex index);

} // namespace drivetrain_sim
