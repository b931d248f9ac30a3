// The operators that only accelerators have kernels for, so that torch never calls the host's.

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/var_mean.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "checks.h"
#include "host.h"
#include "registering.h"

namespace drivetrain_sim {
namespace {

using at::IntArrayRef;
using at::Tensor;

Tensor or_undefined(const std::optional<Tensor>& tensor) {
  return tensor.value_or(Tensor());
}

// Convolution, which torch routes to each accelerator's own ---------------------------------------

Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed,
    IntArrayRef output_padding, int64_t groups) {
  const auto index = launch_on("aten::convolution", {input, weight, or_undefined(bias)});
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  Call call(index);
  std::optional<Tensor> host_bias;
  if (bias.has_value() && bias->defined()) {
    host_bias = call.to_host(*bias);
  }
  return call.to_device(at::convolution(
      call.to_host(input), call.to_host(weight), host_bias, stride, padding, dilation, transposed,
      output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> mask) {
  const auto index = launch_on("aten::convolution_backward", {grad, input, weight});
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  Call call(index);
  const std::vector<int64_t> bias{transposed ? weight.size(1) * groups : weight.size(0)};
  const auto grads = at::convolution_backward(
      call.to_host(grad), call.to_host(input), call.to_host(weight), at::OptionalIntArrayRef(bias),
      stride, padding, dilation, transposed, output_padding, groups, mask);
  return {
      call.to_device(std::get<0>(grads)), call.to_device(std::get<1>(grads)),
      call.to_device(std::get<2>(grads))};
}

// Dropout, whose kernel on the host draws from the host's generator -------------------------------

std::tuple<Tensor, Tensor> native_dropout(
    const Tensor& input, double p, std::optional<bool> train) {
  const auto options = input.options().dtype(at::kBool);
  if (!train.value_or(true)) {
    return {input.clone(), at::ones_like(input, options)};
  }
  auto mask = at::empty_like(input, options).bernoulli_(1 - p);
  return {input.mul(mask).mul(p == 1 ? 0.0 : 1 / (1 - p)), mask};
}

// Batch normalization over several processes, which torch has for accelerators only ---------------

std::vector<int64_t> all_but_channels(const Tensor& input) {
  std::vector<int64_t> dims;
  for (int64_t dim = 0; dim < input.dim(); ++dim) {
    if (dim != 1) {
      dims.push_back(dim);
    }
  }
  return dims;
}

// A value for each channel, in the shape that broadcasts over the input.
Tensor per_channel(const Tensor& value, const Tensor& input) {
  std::vector<int64_t> shape(input.dim(), 1);
  shape[1] = value.numel();
  return value.to(at::kFloat).view(shape);
}

std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& input, double eps) {
  Call call(launch_on("aten::batch_norm_stats", {input}));
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto x = call.to_host(input).to(at::kFloat);
  const auto [variance, mean] =
      at::var_mean(x, all_but_channels(x), /*correction=*/at::Scalar(0));
  return {call.to_device(mean), call.to_device(at::rsqrt(variance + eps))};
}

std::tuple<Tensor, Tensor> batch_norm_gather_stats_with_counts(
    const Tensor& input, const Tensor& means, const Tensor& invstds,
    const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
    double momentum, double eps, const Tensor& counts) {
  Call call(launch_on(
      "aten::batch_norm_gather_stats_with_counts",
      {input, means, invstds, counts, or_undefined(running_mean),
       or_undefined(running_var)}));
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto count = call.to_host(counts).to(at::kFloat).view({-1, 1});
  const auto total = count.sum();
  const auto each_mean = call.to_host(means).to(at::kFloat);
  const auto mean = (each_mean * count).sum(0) / total;
  const auto each_var = call.to_host(invstds).to(at::kFloat).pow(-2) - eps;
  const auto variance = ((each_var + (each_mean - mean).pow(2)) * count).sum(0) / total;
  if (running_mean.has_value() && running_mean->defined()) {
    auto running = call.to_host(*running_mean);
    running.mul_(1 - momentum).add_(mean, momentum);
  }
  if (running_var.has_value() && running_var->defined()) {
    auto running = call.to_host(*running_var);
    running.mul_(1 - momentum).add_(variance * (total / (total - 1)), momentum);
  }
  return {call.to_device(mean), call.to_device(at::rsqrt(variance + eps))};
}

Tensor batch_norm_elemt(
    const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const Tensor& mean, const Tensor& invstd, double) {
  Call call(launch_on(
      "aten::batch_norm_elemt",
      {input, mean, invstd, or_undefined(weight), or_undefined(bias)}));
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto x = call.to_host(input);
  auto y = (x.to(at::kFloat) - per_channel(call.to_host(mean), x)) *
      per_channel(call.to_host(invstd), x);
  if (weight.has_value() && weight->defined()) {
    y = y * per_channel(call.to_host(*weight), x);
  }
  if (bias.has_value() && bias->defined()) {
    y = y + per_channel(call.to_host(*bias), x);
  }
  return call.to_device(y.to(x.scalar_type()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_reduce(
    const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& invstd,
    const std::optional<Tensor>& weight, bool, bool weight_grad, bool bias_grad) {
  Call call(launch_on("aten::batch_norm_backward_reduce", {grad, input, mean, invstd}));
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto dy = call.to_host(grad).to(at::kFloat);
  const auto x = call.to_host(input).to(at::kFloat);
  const auto dims = all_but_channels(x);
  const auto sum_dy = dy.sum(dims);
  const auto sum_dy_xmu = (dy * (x - per_channel(call.to_host(mean), x))).sum(dims);
  const auto dtype = weight.has_value() && weight->defined() ? weight->scalar_type() : at::kFloat;
  Tensor grad_weight;
  Tensor grad_bias;
  if (weight_grad) {
    grad_weight = call.to_device((sum_dy_xmu * call.to_host(invstd)).to(dtype));
  }
  if (bias_grad) {
    grad_bias = call.to_device(sum_dy.clone().to(dtype));
  }
  return {call.to_device(sum_dy), call.to_device(sum_dy_xmu), grad_weight, grad_bias};
}

Tensor batch_norm_backward_elemt(
    const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& invstd,
    const std::optional<Tensor>& weight, const Tensor& sum_dy, const Tensor& sum_dy_xmu,
    const Tensor& counts) {
  Call call(launch_on(
      "aten::batch_norm_backward_elemt",
      {grad, input, mean, invstd, sum_dy, sum_dy_xmu, counts, or_undefined(weight)}));
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto x = call.to_host(input).to(at::kFloat);
  const auto total = call.to_host(counts).sum().to(at::kFloat);
  const auto scale = per_channel(call.to_host(invstd), x);
  const auto mean_dy = per_channel(call.to_host(sum_dy) / total, x);
  const auto mean_dy_xmu = per_channel(call.to_host(sum_dy_xmu) / total, x);
  const auto centred = x - per_channel(call.to_host(mean), x);
  auto result = call.to_host(grad).to(at::kFloat) - mean_dy - centred * mean_dy_xmu * scale.pow(2);
  result = result * scale;
  if (weight.has_value() && weight->defined()) {
    result = result * per_channel(call.to_host(*weight), x);
  }
  return call.to_device(result.to(input.scalar_type()));
}

// Cells of recurrent modules, which torch fuses on accelerators -----------------------------------

Tensor with_bias(Call& call, const Tensor& gates, const std::optional<Tensor>& bias) {
  const auto host = call.to_host(gates);
  return bias.has_value() && bias->defined() ? host + call.to_host(*bias) : host;
}

// The gradient in front of a sigmoid or a tanh, from the one behind it and its value.
Tensor through_sigmoid(const Tensor& grad, const Tensor& value) {
  return grad * value * (1 - value);
}
Tensor through_tanh(const Tensor& grad, const Tensor& value) {
  return grad * (1 - value * value);
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(
    const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cx,
    const std::optional<Tensor>& input_bias, const std::optional<Tensor>& hidden_bias) {
  Call call(launch_on("aten::_thnn_fused_lstm_cell", {input_gates, hidden_gates, cx}));
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto gates =
      (with_bias(call, input_gates, input_bias) + with_bias(call, hidden_gates, hidden_bias))
          .chunk(4, 1);
  const auto i = at::sigmoid(gates[0]);
  const auto f = at::sigmoid(gates[1]);
  const auto g = at::tanh(gates[2]);
  const auto o = at::sigmoid(gates[3]);
  const auto cy = f * call.to_host(cx) + i * g;
  return {
      call.to_device(o * at::tanh(cy)), call.to_device(cy),
      call.to_device(at::cat({i, f, g, o}, 1))};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(
    const std::optional<Tensor>& grad_hy, const std::optional<Tensor>& grad_cy, const Tensor& cx,
    const Tensor& cy, const Tensor& workspace, bool has_bias) {
  Call call(launch_on(
      "aten::_thnn_fused_lstm_cell_backward_impl",
      {cx, cy, workspace, or_undefined(grad_hy), or_undefined(grad_cy)}));
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto gates = call.to_host(workspace).chunk(4, 1);
  const auto &i = gates[0], &f = gates[1], &g = gates[2], &o = gates[3];
  const auto tanh_cy = at::tanh(call.to_host(cy));
  auto grad_o = at::zeros_like(o);
  auto grad_c = at::zeros_like(o);
  if (grad_hy.has_value() && grad_hy->defined()) {
    const auto grad = call.to_host(*grad_hy);
    grad_o = through_sigmoid(grad * tanh_cy, o);
    grad_c = through_tanh(grad * o, tanh_cy);
  }
  if (grad_cy.has_value() && grad_cy->defined()) {
    grad_c = grad_c + call.to_host(*grad_cy);
  }
  const auto grad_gates = at::cat(
      {through_sigmoid(grad_c * g, i), through_sigmoid(grad_c * call.to_host(cx), f),
       through_tanh(grad_c * i, g), grad_o},
      1);
  const auto grad_bias = has_bias ? call.to_device(grad_gates.sum(0)) : Tensor();
  return {call.to_device(grad_gates), call.to_device(grad_c * f), grad_bias};
}

std::tuple<Tensor, Tensor> gru_cell(
    const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hx,
    const std::optional<Tensor>& input_bias, const std::optional<Tensor>& hidden_bias) {
  Call call(launch_on("aten::_thnn_fused_gru_cell", {input_gates, hidden_gates, hx}));
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto from_input = with_bias(call, input_gates, input_bias).chunk(3, 1);
  const auto from_hidden = with_bias(call, hidden_gates, hidden_bias).chunk(3, 1);
  const auto before = call.to_host(hx);
  const auto r = at::sigmoid(from_input[0] + from_hidden[0]);
  const auto z = at::sigmoid(from_input[1] + from_hidden[1]);
  const auto n = at::tanh(from_input[2] + r * from_hidden[2]);
  return {
      call.to_device(n + z * (before - n)),
      call.to_device(at::cat({r, z, n, before, from_hidden[2]}, 1))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(
    const Tensor& grad_hy, const Tensor& workspace, bool has_bias) {
  Call call(launch_on("aten::_thnn_fused_gru_cell_backward", {grad_hy, workspace}));
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto kept = call.to_host(workspace).chunk(5, 1);
  const auto &r = kept[0], &z = kept[1], &n = kept[2], &before = kept[3], &hidden = kept[4];
  const auto grad = call.to_host(grad_hy);
  const auto grad_z = through_sigmoid(grad * (before - n), z);
  const auto grad_n = through_tanh(grad * (1 - z), n);
  const auto grad_r = through_sigmoid(grad_n * hidden, r);
  const auto grad_input = at::cat({grad_r, grad_z, grad_n}, 1);
  const auto grad_hidden = at::cat({grad_r, grad_z, grad_n * r}, 1);
  Tensor grad_input_bias;
  Tensor grad_hidden_bias;
  if (has_bias) {
    grad_input_bias = call.to_device(grad_input.sum(0));
    grad_hidden_bias = call.to_device(grad_hidden.sum(0));
  }
  return {
      call.to_device(grad_input), call.to_device(grad_hidden), call.to_device(grad * z),
      grad_input_bias, grad_hidden_bias};
}

} // namespace

void register_accelerator_only() {
  static torch::Library library = kernels_of("aten", device_key());
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
  library.impl("native_dropout", &native_dropout);
  library.impl("batch_norm_stats", &batch_norm_stats);
  library.impl("batch_norm_gather_stats_with_counts", &batch_norm_gather_stats_with_counts);
  library.impl("batch_norm_elemt", &batch_norm_elemt);
  library.impl("batch_norm_backward_reduce", &batch_norm_backward_reduce);
  library.impl("batch_norm_backward_elemt", &batch_norm_backward_elemt);
  library.impl("_thnn_fused_lstm_cell", &lstm_cell);
  library.impl("_thnn_fused_lstm_cell_backward_impl", &lstm_cell_backward);
  library.impl("_thnn_fused_gru_cell", &gru_cell);
  library.impl("_thnn_fused_gru_cell_backward", &gru_cell_backward);
}

} // namespace drivetrain_sim
