// Every operator that has no kernel of its own here runs the host's kernel on the device's memory.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <unordered_set>

#include "checks.h"
#include "device.h"
#include "host.h"
#include "registering.h"
#include "runtime.h"

namespace drivetrain_sim {
namespace {

using c10::IValue;
using Stack = torch::jit::Stack;

// Arguments that are on the host on every device, by operator: indices, which any device takes
// from there, and lengths, which the host needs to know.
bool may_be_on_host(const std::string& name) {
  static const std::unordered_set<std::string> names{
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
      "aten::_pack_padded_sequence", "aten::_ctc_loss", "aten::_ctc_loss_backward"};
  return names.count(name) > 0;
}

// Call `visit` with every tensor among the arguments.
template <typename Visit>
void each_tensor(at::ArrayRef<IValue> arguments, Visit visit) {
  for (const auto& argument : arguments) {
    if (argument.isTensor()) {
      visit(argument.toTensor());
    } else if (argument.isTensorList()) {
      for (const at::Tensor& tensor : argument.toTensorVector()) {
        visit(tensor);
      }
    } else if (argument.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& tensor : argument.toOptionalTensorVector()) {
        if (tensor.has_value()) {
          visit(*tensor);
        }
      }
    }
  }
}

// The device that a call is for. Mixing devices is an error, but for numbers of the host.
c10::DeviceIndex device_of(const std::string& name, at::ArrayRef<IValue> arguments) {
  std::optional<c10::Device> found;
  each_tensor(arguments, [&](const at::Tensor& tensor) {
    if (!on_device(tensor)) {
      return;
    }
    if (found.has_value() && *found != tensor.device()) {
      refuse_mixture(name, *found, tensor.device());
    }
    found = tensor.device();
  });
  if (!found.has_value()) {
    // An operator that makes a tensor may be told where.
    for (const auto& argument : arguments) {
      if (argument.isDevice() && argument.toDevice().has_index()) {
        return argument.toDevice().index();
      }
    }
    return current_device();
  }
  if (!may_be_on_host(name)) {
    each_tensor(arguments, [&](const at::Tensor& tensor) {
      if (tensor.defined() && !on_device(tensor) && tensor.dim() > 0) {
        refuse_mixture(name, *found, tensor.device());
      }
    });
  }
  return found->index();
}

IValue to_host(Call& call, const IValue& argument, c10::DeviceIndex index) {
  if (argument.isTensor()) {
    return call.to_host(argument.toTensor());
  }
  if (argument.isTensorList()) {
    c10::List<at::Tensor> hosts;
    for (const at::Tensor& tensor : argument.toTensorVector()) {
      hosts.push_back(call.to_host(tensor));
    }
    return hosts;
  }
  if (argument.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> hosts;
    for (const std::optional<at::Tensor>& tensor : argument.toOptionalTensorVector()) {
      hosts.push_back(
          tensor.has_value() ? std::make_optional(call.to_host(*tensor)) : std::nullopt);
    }
    return hosts;
  }
  if (argument.isDevice()) {
    return c10::Device(c10::kCPU);
  }
  if (argument.isGenerator()) {
    return host_generator(argument.toGenerator(), index);
  }
  return argument;
}

IValue to_device(Call& call, const IValue& result) {
  if (result.isTensor()) {
    return call.to_device(result.toTensor());
  }
  if (result.isTensorList()) {
    c10::List<at::Tensor> tensors;
    for (const at::Tensor& tensor : result.toTensorVector()) {
      tensors.push_back(call.to_device(tensor));
    }
    return tensors;
  }
  return result;
}

// Whether the operator only looks at the same memory in another way.
bool is_view(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns()) {
    if (result.alias_info() != nullptr) {
      return !result.alias_info()->isWrite();
    }
  }
  return false;
}

bool is_generator(const c10::Argument& argument) {
  const auto& type = argument.type();
  if (const auto optional = type->cast<c10::OptionalType>()) {
    return optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
  }
  return type->kind() == c10::TypeKind::GeneratorType;
}

// Whether the host has to wait for the result, since it decides a shape or becomes a number.
bool synchronizes(const c10::OperatorHandle& op, at::ArrayRef<IValue> arguments) {
  if (op.hasTag(at::Tag::data_dependent_output)) {
    return true;
  }
  if (!op.hasTag(at::Tag::dynamic_output_shape)) {
    return false;
  }
  if (op.schema().name() != "aten::index") {
    return true;
  }
  // Indexing has a shape that depends on data only where a mask is among the indices.
  bool mask = false;
  each_tensor(arguments.slice(1), [&](const at::Tensor& index) {
    mask = mask || (index.defined() &&
                    (index.scalar_type() == at::kBool || index.scalar_type() == at::kByte));
  });
  return mask;
}

// Whether the operator writes over one of its inputs.
bool is_in_place(const c10::FunctionSchema& schema, at::ArrayRef<IValue> arguments) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& argument = schema.arguments()[i];
    if (argument.alias_info() == nullptr || !argument.alias_info()->isWrite()) {
      continue;
    }
    if (!argument.is_out()) {
      return true;
    }
    // An operator such as add_ comes here as add.out with its own input as the output.
    for (size_t j = 0; j < arguments.size(); ++j) {
      if (j != i && arguments[i].isTensor() && arguments[j].isTensor() &&
          arguments[i].toTensor().is_same(arguments[j].toTensor())) {
        return true;
      }
    }
  }
  return false;
}

void check_options(const c10::FunctionSchema& schema, at::ArrayRef<IValue> arguments) {
  const auto& state = global_state();
  TORCH_CHECK(
      state.inference_mode || !c10::InferenceMode::is_enabled(),
      "The simulated device does not support inference mode, and ", schema.name(),
      " was called in it. Use torch.no_grad().");
  if (state.inplace || !c10::GradMode::is_enabled() || !is_in_place(schema, arguments)) {
    return;
  }
  bool recorded = false;
  each_tensor(arguments, [&](const at::Tensor& tensor) {
    recorded = recorded || (tensor.defined() && tensor.requires_grad());
  });
  TORCH_CHECK(
      !recorded,
      "The simulated device does not support operators in place where gradients are recorded, and ",
      schema.name(), " was called.");
}

void run_on_host(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  const auto arguments = torch::jit::last(stack, count);
  const auto index = device_of(schema.name(), arguments);
  check_options(schema, arguments);
  TORCH_CHECK_NOT_IMPLEMENTED(
      op.hasKernelForDispatchKey(c10::DispatchKey::CPU),
      "The simulated device runs the kernels of the CPU, and there is none for ", schema.name(),
      ".", schema.overload_name());

  if (!is_view(schema)) {
    if (synchronizes(op, arguments)) {
      synchronize(index);
    }
    launch(schema.name().c_str(), index);
  }

  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  Call call(index);
  bool has_generator = false;
  const auto begin = stack->size() - count;
  for (size_t i = 0; i < count; ++i) {
    auto& argument = (*stack)[begin + i];
    if (is_generator(schema.arguments()[i])) {
      has_generator = true;
      argument = host_generator(argument.toOptional<at::Generator>(), index);
    } else {
      argument = to_host(call, argument, index);
    }
  }
  // It would draw from the generator of the host, and nobody would see that.
  TORCH_CHECK_NOT_IMPLEMENTED(
      has_generator || !op.hasTag(at::Tag::nondeterministic_seeded),
      "The simulated device cannot give its random numbers to ", schema.name());

  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  call.write_back();
  const auto results = schema.returns().size();
  for (size_t i = 0; i < results; ++i) {
    // The sizes of a packed batch are for the host, on every device.
    if (i == 1 && schema.name() == "aten::_pack_padded_sequence") {
      continue;
    }
    auto& result = (*stack)[stack->size() - results + i];
    result = to_device(call, result);
  }
}

} // namespace

void register_fallback() {
  static torch::Library others = kernels_of("_", device_key());
  others.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  // Torch would make these from operators with an output, which resize it and warn.
  static torch::Library library = kernels_of("aten", device_key());
  for (const auto* name : {"mse_loss", "smooth_l1_loss"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
}

} // namespace drivetrain_sim
