#include "runtime.h"

#include "registering.h"

#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

namespace drivetrain_sim {
namespace {

c10::DeviceType g_type = c10::DeviceType::PrivateUse1;
c10::DispatchKey g_key = c10::DispatchKey::PrivateUse1;
c10::DispatchKey g_autocast_key = c10::DispatchKey::AutocastPrivateUse1;
DeviceState g_devices[kMaxDevices];
GlobalState g_state;
thread_local c10::DeviceIndex t_current = 0;

// Who owns a piece of device memory, and how much of the limit it takes.
struct Block {
  c10::DataPtr host;
  size_t bytes;
  c10::DeviceIndex index;
};

void free_block(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  device_state(block->index).allocated -= static_cast<int64_t>(block->bytes);
}

std::string mebibytes(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f MiB", static_cast<double>(bytes) / (1 << 20));
  return text;
}

// The error is worded as those that torch raises for other devices.
void refuse(int64_t bytes, c10::DeviceIndex index) {
  auto& state = device_state(index);
  const int64_t used = state.allocated;
  const int64_t limit = state.memory_limit;
  ++state.out_of_memory;
  TORCH_CHECK_WITH(
      OutOfMemoryError, false, "Simulated device out of memory. Tried to allocate ",
      mebibytes(bytes), ". Device ", static_cast<int>(index), " has a total capacity of ",
      mebibytes(limit), " of which ", mebibytes(limit - used), " is free. Of the allocated memory ",
      mebibytes(used), " is allocated by PyTorch.");
}

// Take `bytes` of the limit.
void reserve(int64_t bytes, c10::DeviceIndex index) {
  auto& state = device_state(index);
  const int64_t limit = state.memory_limit;
  const int64_t now = state.allocated += bytes;
  if (limit > 0 && now > limit) {
    state.allocated -= bytes;
    refuse(bytes, index);
  }
  int64_t peak = state.peak;
  while (now > peak && !state.peak.compare_exchange_weak(peak, now)) {
  }
}

void wait(int64_t nanoseconds) {
  using clock = std::chrono::steady_clock;
  const auto until = clock::now() + std::chrono::nanoseconds(nanoseconds);
  // A sleep takes 50 microseconds more than it was asked to, so the rest is spent spinning.
  if (nanoseconds > 200'000) {
    std::this_thread::sleep_for(std::chrono::nanoseconds(nanoseconds - 100'000));
  }
  while (clock::now() < until) {
  }
}

[[noreturn]] void fail(const char* what, c10::DeviceIndex index) {
  const auto message = std::string("Simulated device error: device ") + std::to_string(index) +
      " failed at " + what + "; it was told to. Every later call on it fails too.";
#if DRIVETRAIN_TORCH >= 208
  throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, 700, message);
#else
  TORCH_CHECK(false, message);
#endif
}

} // namespace

c10::DeviceType device_type() {
  return g_type;
}
c10::DispatchKey device_key() {
  return g_key;
}
c10::DispatchKey autocast_key() {
  return g_autocast_key;
}

DeviceState& device_state(c10::DeviceIndex index) {
  TORCH_INTERNAL_ASSERT(index >= 0 && index < kMaxDevices, "no such simulated device: ", index);
  return g_devices[index];
}

GlobalState& global_state() {
  return g_state;
}

c10::DeviceIndex current_device() {
  return t_current;
}

void set_current_device(c10::DeviceIndex index) {
  TORCH_CHECK(
      index >= 0 && index < g_state.devices, "Simulated device error: invalid device ordinal ",
      static_cast<int>(index), "; there are ", g_state.devices.load(), ".");
  t_current = index;
}

c10::DataPtr adopt(c10::DataPtr host, size_t bytes, c10::DeviceIndex index) {
  reserve(static_cast<int64_t>(bytes), index);
  void* data = host.get();
  auto* block = new Block{std::move(host), bytes, index};
  return {data, block, &free_block, c10::Device(device_type(), index)};
}

c10::DataPtr allocate(size_t bytes, c10::DeviceIndex index) {
  // Before the host is asked, which may have less than a limit in the terabytes.
  const auto& state = device_state(index);
  if (state.memory_limit > 0 &&
      state.allocated + static_cast<int64_t>(bytes) > state.memory_limit) {
    refuse(static_cast<int64_t>(bytes), index);
  }
  return adopt(c10::GetCPUAllocator()->allocate(bytes), bytes, index);
}

void launch(const char* kernel, c10::DeviceIndex index) {
  auto& state = device_state(index);
  ++state.launches;
  if (state.failed) {
    fail(kernel, index);
  }
  if (state.launches_until_failure > 0 && --state.launches_until_failure == 0) {
    state.failed = 1;
    fail(kernel, index);
  }
  if (const int64_t nanoseconds = g_state.latency_ns) {
    wait(nanoseconds);
  }
}

void synchronize(c10::DeviceIndex index) {
  auto& state = device_state(index);
  ++state.synchronizations;
  if (state.failed) {
    fail("a synchronization", index);
  }
}

} // namespace drivetrain_sim

// Register with torch under the device type and the dispatch key of these names. Once; returns -1 if
// torch does not know one of them.
extern "C" int drivetrain_sim_register(const char* name, const char* key) {
  try {
    drivetrain_sim::g_type = c10::Device(name).type();
    drivetrain_sim::g_key = c10::parseDispatchKey(key);
    drivetrain_sim::g_autocast_key = c10::parseDispatchKey(std::string("Autocast") + key);
  } catch (const c10::Error&) {
    return -1;
  }
  drivetrain_sim::register_device();
  drivetrain_sim::register_tensors();
  drivetrain_sim::register_fallback();
  drivetrain_sim::register_accelerator_only();
  drivetrain_sim::register_autocast();
  return 0;
}

// What Python sets and reads, by name: a plain C interface, so that building needs no Python
// headers and one library serves every Python version.
namespace {

using drivetrain_sim::DeviceState;
using drivetrain_sim::GlobalState;
using drivetrain_sim::Number;

struct DeviceName {
  const char* name;
  Number DeviceState::*member;
};
constexpr DeviceName kDeviceNames[] = {
    {"memory_limit", &DeviceState::memory_limit},
    {"launches_until_failure", &DeviceState::launches_until_failure},
    {"failed", &DeviceState::failed},
    {"allocated", &DeviceState::allocated},
    {"peak", &DeviceState::peak},
    {"launches", &DeviceState::launches},
    {"uploads", &DeviceState::uploads},
    {"uploaded_bytes", &DeviceState::uploaded_bytes},
    {"blocking_uploads", &DeviceState::blocking_uploads},
    {"downloads", &DeviceState::downloads},
    {"downloaded_bytes", &DeviceState::downloaded_bytes},
    {"device_copies", &DeviceState::device_copies},
    {"synchronizations", &DeviceState::synchronizations},
    {"out_of_memory", &DeviceState::out_of_memory},
};

struct GlobalName {
  const char* name;
  Number GlobalState::*member;
};
constexpr GlobalName kGlobalNames[] = {
    {"devices", &GlobalState::devices},
    {"latency_ns", &GlobalState::latency_ns},
    {"fp16", &GlobalState::fp16},
    {"inference_mode", &GlobalState::inference_mode},
    {"inplace", &GlobalState::inplace},
};

Number* find(const char* name, int device) {
  for (const auto& each : kGlobalNames) {
    if (std::strcmp(each.name, name) == 0) {
      return &(drivetrain_sim::global_state().*each.member);
    }
  }
  if (device < 0 || device >= drivetrain_sim::kMaxDevices) {
    return nullptr;
  }
  for (const auto& each : kDeviceNames) {
    if (std::strcmp(each.name, name) == 0) {
      return &(drivetrain_sim::device_state(static_cast<c10::DeviceIndex>(device)).*each.member);
    }
  }
  return nullptr;
}

} // namespace

// Returns 0, or -1 for a name that there is not.
extern "C" int drivetrain_sim_set(const char* name, int device, int64_t value) {
  auto* number = find(name, device);
  if (number != nullptr) {
    *number = value;
  }
  return number == nullptr ? -1 : 0;
}

// Returns the number, or -1 for a name that there is not.
extern "C" int64_t drivetrain_sim_get(const char* name, int device) {
  const auto* number = find(name, device);
  return number == nullptr ? -1 : number->load();
}

extern "C" int drivetrain_sim_max_devices() {
  return drivetrain_sim::kMaxDevices;
}
