// What torch asks of every device type: memory, the current device, streams, random numbers.
// Streams and events order nothing, since a kernel has finished when its launch returns.

#include "runtime.h"

#include <chrono>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include "device.h"
#include "hooks.h"
#include "registering.h"

namespace drivetrain_sim {
namespace {

c10::DeviceIndex or_current(c10::DeviceIndex index) {
  return index < 0 ? current_device() : index;
}

// Memory ------------------------------------------------------------------------------------------

// From 2.9 on, torch.accelerator.memory_allocated() and its like ask the allocator.
#if DRIVETRAIN_TORCH >= 209
using AllocatorBase = c10::DeviceAllocator;
#else
using AllocatorBase = c10::Allocator;
#endif

struct Allocator final : AllocatorBase {
  c10::DataPtr allocate(size_t bytes) override {
    return drivetrain_sim::allocate(bytes, current_device());
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
#if DRIVETRAIN_TORCH >= 209
  bool initialized() override {
    return true;
  }
  // Nothing is kept when it is freed. Torch changed the arguments; one of these two overrides.
  void emptyCache() {}
  void emptyCache(std::pair<unsigned long long, unsigned long long>) {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex index) override {
    auto& state = device_state(index);
    state.peak = state.allocated.load();
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    auto& state = device_state(index);
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* each : {&stats.allocated_bytes[0], &stats.reserved_bytes[0]}) {
      each->current = state.allocated;
      each->peak = state.peak;
    }
    stats.num_ooms = state.out_of_memory;
    return stats;
  }
#endif
};

// Host memory that a real device could read without waiting. Only who asks can tell.
struct PinnedAllocator final : c10::Allocator {
  struct Piece {
    c10::DataPtr host;
    PinnedAllocator* owner;
  };
  static void free_piece(void* context) {
    std::unique_ptr<Piece> piece(static_cast<Piece*>(context));
    const std::lock_guard<std::mutex> lock(piece->owner->mutex);
    piece->owner->pieces.erase(piece->host.get());
  }
  c10::DataPtr allocate(size_t bytes) override {
    auto host = c10::GetCPUAllocator()->allocate(bytes);
    void* data = host.get();
    if (data == nullptr) {
      return host;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    pieces[data] = bytes;
    return {data, new Piece{std::move(host), this}, &free_piece, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool holds(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    return pieces.count(data) > 0;
  }
  std::mutex mutex;
  std::unordered_map<const void*, size_t> pieces;
};

// Never destroyed: tensors may outlive static objects when the process ends.
Allocator* const g_allocator = new Allocator;
PinnedAllocator* const g_pinned = new PinnedAllocator;

// The current device, streams and events ----------------------------------------------------------

thread_local c10::StreamId t_streams[kMaxDevices] = {};
std::atomic<c10::StreamId> g_next_stream{1};

struct Event {
  std::chrono::steady_clock::time_point recorded;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return device_type();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    set_current_device(device.index());
    return before;
  }
  c10::Device getDevice() const override {
    return {device_type(), current_device()};
  }
  void setDevice(c10::Device device) const override {
    set_current_device(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < global_state().devices) {
      set_current_device(device.index());
    }
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(global_state().devices.load());
  }

  // These two may not throw in older versions of torch.
  c10::Stream getStream(c10::Device device) const noexcept override {
    const auto index = or_current(device.index());
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(device_type(), index), t_streams[index]);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    const auto before = getStream(stream.device());
    t_streams[stream.device_index()] = stream.id();
    return before;
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(device_type(), or_current(device.index())));
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    const c10::Device where(device_type(), or_current(device.index()));
    return c10::Stream(c10::Stream::UNSAFE, where, g_next_stream++);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    synchronize(stream.device_index());
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    synchronize(or_current(index));
  }

  void record(
      void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {
    if (*event == nullptr) {
      *event = new Event;
    }
    static_cast<Event*>(*event)->recorded = std::chrono::steady_clock::now();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {
    synchronize(current_device());
  }
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    const auto passed = static_cast<Event*>(to)->recorded - static_cast<Event*>(from)->recorded;
    return std::chrono::duration<double, std::milli>(passed).count();
  }
};

// Random numbers ----------------------------------------------------------------------------------

// A generator of the device that draws from one of the host's, because kernels run there.
struct GeneratorImpl final : c10::GeneratorImpl {
  explicit GeneratorImpl(c10::DeviceIndex index, at::Generator host)
      : c10::GeneratorImpl(
            c10::Device(device_type(), index), c10::DispatchKeySet(device_key())),
        host(std::move(host)) {}
  c10::GeneratorImpl* inner() const {
    return host.unsafeGetGeneratorImpl();
  }
  void set_current_seed(uint64_t seed) override {
    inner()->set_current_seed(seed);
  }
  uint64_t current_seed() const override {
    return inner()->current_seed();
  }
  uint64_t seed() override {
    return inner()->seed();
  }
  void set_offset(uint64_t offset) override {
    inner()->set_offset(offset);
  }
  uint64_t get_offset() const override {
    return inner()->get_offset();
  }
  void set_state(const c10::TensorImpl& state) override {
    inner()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner()->get_state();
  }
  GeneratorImpl* clone_impl() const override {
    return new GeneratorImpl(device().index(), host.clone());
  }
  at::Generator host;
};

} // namespace

at::Generator new_generator(c10::DeviceIndex index) {
  return at::make_generator<GeneratorImpl>(index, at::detail::createCPUGenerator());
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static auto* const all = [] {
    auto* made = new std::vector<at::Generator>;
    for (c10::DeviceIndex each = 0; each < kMaxDevices; ++each) {
      made->push_back(new_generator(each));
    }
    return made;
  }();
  return all->at(or_current(index));
}

c10::Allocator* pinned_allocator() {
  return g_pinned;
}
bool is_pinned(const void* data) {
  return g_pinned->holds(data);
}

c10::Allocator* allocator() {
  return g_allocator;
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  auto fresh = allocate(bytes, storage.device().index());
  const auto kept = std::min(bytes, storage.nbytes());
  if (kept > 0) {
    std::memcpy(fresh.get(), storage.data(), kept);
  }
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

at::Generator host_generator(const std::optional<at::Generator>& asked, c10::DeviceIndex index) {
  const auto& generator =
      asked.has_value() && asked->defined() ? *asked : default_generator(index);
  TORCH_CHECK(
      generator.device().type() == device_type(), "Expected a generator of device type '",
      c10::DeviceTypeName(device_type(), /*lower_case=*/true), "' but found one of '",
      generator.device().type(), "'");
  return static_cast<GeneratorImpl*>(generator.unsafeGetGeneratorImpl())->host;
}

namespace {

// Torch's own types have packages of their own elsewhere, whose allocators torch.accelerator cannot
// ask about memory.
struct PlainAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return g_allocator->allocate(bytes);
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    g_allocator->copy_data(to, from, bytes);
  }
};
PlainAllocator* const g_plain = new PlainAllocator;

struct OwnHooks final : Hooks<at::PrivateUse1HooksInterface> {
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};

// Python reaches the generators by these, since torch has no general way to.
at::Tensor rng_state(int64_t index) {
  return default_generator(static_cast<c10::DeviceIndex>(index)).get_state();
}
void set_rng_state(const at::Tensor& state, int64_t index) {
  auto generator = default_generator(static_cast<c10::DeviceIndex>(index));
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}
void seed(int64_t value, int64_t index) {
  auto generator = default_generator(static_cast<c10::DeviceIndex>(index));
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_current_seed(static_cast<uint64_t>(value));
}
int64_t initial_seed(int64_t index) {
  return static_cast<int64_t>(
      default_generator(static_cast<c10::DeviceIndex>(index)).current_seed());
}

TORCH_LIBRARY_FRAGMENT(drivetrain_sim, library) {
  library.def("current_device() -> int", [] { return static_cast<int64_t>(current_device()); });
  library.def("set_device(int device) -> ()", [](int64_t index) {
    set_current_device(static_cast<c10::DeviceIndex>(index));
  });
  library.def("rng_state(int device) -> Tensor", &rng_state);
  library.def("set_rng_state(Tensor state, int device) -> ()", &set_rng_state);
  library.def("seed(int value, int device) -> ()", &seed);
  library.def("initial_seed(int device) -> int", &initial_seed);
}

} // namespace

void register_device() {
  static const c10::impl::DeviceGuardImplRegistrar guard(device_type(), new Guard);
  if (device_type() == c10::DeviceType::PrivateUse1) {
    c10::SetAllocator(device_type(), g_allocator);
    at::RegisterPrivateUse1HooksInterface(new OwnHooks);
  } else {
    c10::SetAllocator(device_type(), g_plain); // its hooks are in a library of their own
  }
}

} // namespace drivetrain_sim
