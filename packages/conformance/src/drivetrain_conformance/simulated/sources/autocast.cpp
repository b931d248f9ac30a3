// torch.autocast on the simulated device, by the rules that torch has for other accelerators.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "registering.h"
#include "runtime.h"

// Declared here, because the header that has them includes every operator that torch has, which
// would take longer to compile than all the rest.
namespace at::autocast {
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType device_type);
TORCH_API Tensor
cached_cast(at::ScalarType to_type, const Tensor& arg, c10::DeviceType device_type);
} // namespace at::autocast

namespace drivetrain_sim {
namespace {

using c10::IValue;
using Stack = torch::jit::Stack;

bool is_eligible(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == device_type() && tensor.is_floating_point() &&
      tensor.scalar_type() != at::kDouble;
}

IValue cast(const IValue& argument, at::ScalarType dtype) {
  if (argument.isTensor()) {
    return at::autocast::cached_cast(dtype, argument.toTensor(), device_type());
  }
  if (argument.isTensorList()) {
    c10::List<at::Tensor> tensors;
    for (const at::Tensor& tensor : argument.toTensorVector()) {
      tensors.push_back(at::autocast::cached_cast(dtype, tensor, device_type()));
    }
    return tensors;
  }
  return argument;
}

// Call the operator itself, with all its tensors in one format.
void call_in(at::ScalarType dtype, const c10::OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(autocast_key());
  const auto count = op.schema().arguments().size();
  for (auto i = stack->size() - count; i < stack->size(); ++i) {
    (*stack)[i] = cast((*stack)[i], dtype);
  }
  op.callBoxed(stack);
}

void in_lower_precision(const c10::OperatorHandle& op, Stack* stack) {
  call_in(at::autocast::get_autocast_dtype(device_type()), op, stack);
}

void in_float(const c10::OperatorHandle& op, Stack* stack) {
  call_in(at::kFloat, op, stack);
}

// Sums and the like: the input stays, and the result is float unless the user said otherwise.
void with_float_result(const c10::OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(autocast_key());
  const auto& arguments = op.schema().arguments();
  const auto begin = stack->size() - arguments.size();
  const auto& first = (*stack)[begin];
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& argument = (*stack)[begin + i];
    if (arguments[i].name() == "dtype" && argument.isNone() && is_eligible(first.toTensor())) {
      argument = at::kFloat;
    }
  }
  op.callBoxed(stack);
}

// The widest format among the inputs.
void promoted(const c10::OperatorHandle& op, Stack* stack) {
  auto dtype = at::autocast::get_autocast_dtype(device_type());
  const auto widen = [&](const at::Tensor& tensor) {
    if (is_eligible(tensor) && tensor.scalar_type() == at::kFloat) {
      dtype = at::kFloat;
    }
  };
  for (const auto& argument : torch::jit::last(stack, op.schema().arguments().size())) {
    if (argument.isTensor()) {
      widen(argument.toTensor());
    } else if (argument.isTensorList()) {
      for (const at::Tensor& tensor : argument.toTensorVector()) {
        widen(tensor);
      }
    }
  }
  call_in(dtype, op, stack);
}

void refuse_cross_entropy(const c10::OperatorHandle&, Stack*) {
  TORCH_CHECK(
      false,
      "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast. Use "
      "binary_cross_entropy_with_logits, or leave autocast around it.");
}

// Names that a version of torch does not have are never called.
constexpr const char* kLowerPrecision[] = {
    "_convolution", "_convolution.deprecated", "conv1d", "conv2d", "conv3d", "conv_tbc",
    "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "prelu",
    "addmm", "addmv", "addr", "matmul", "einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm",
    "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot", "lstm_cell", "gru_cell",
    "rnn_tanh_cell", "rnn_relu_cell", "scaled_dot_product_attention"};

constexpr const char* kFullPrecision[] = {
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p",
    "reciprocal", "rsqrt", "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar",
    "softplus", "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "frobenius_norm.dim",
    "nuclear_norm", "nuclear_norm.dim", "cosine_similarity", "poisson_nll_loss",
    "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss",
    "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss",
    "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp",
    "norm.Scalar", "norm.ScalarOpt_dim", "norm.names_ScalarOpt_dim", "upsample_nearest1d",
    "_upsample_nearest_exact1d", "upsample_nearest2d", "_upsample_nearest_exact2d",
    "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "_upsample_bilinear2d_aa", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_bicubic2d_aa"};

constexpr const char* kFloatResult[] = {
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum",
    "linalg_vector_norm", "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum",
    "sum.dim_IntList"};

constexpr const char* kPromoted[] = {
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put",
    "tensordot", "scatter_add"};

} // namespace

void register_autocast() {
  static torch::Library others = kernels_of("_", autocast_key());
  others.fallback(torch::CppFunction::makeFallthrough());
  static torch::Library library = kernels_of("aten", autocast_key());
  for (const auto* name : kLowerPrecision) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&in_lower_precision>());
  }
  for (const auto* name : kFullPrecision) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&in_float>());
  }
  for (const auto* name : kFloatResult) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&with_float_result>());
  }
  for (const auto* name : kPromoted) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&promoted>());
  }
  library.impl(
      "binary_cross_entropy", torch::CppFunction::makeFromBoxedFunction<&refuse_cross_entropy>());
}

} // namespace drivetrain_sim
