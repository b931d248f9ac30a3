"""``FusedAdamW`` with the vendor's layout of state: steps are counted in the group."""

from __future__ import annotations

import torch

from habana_frameworks.torch import core
from habana_frameworks.torch.utils.internal import is_lazy


class FusedAdamW(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=0.001,
        betas=(0.9, 0.999),
        eps=1e-06,
        weight_decay=0.0,
        bias_correction=True,
        moments_dtype=None,
    ):
        self.moments = moments_dtype if isinstance(moments_dtype, tuple) else (moments_dtype,) * 2
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            one, two = group["betas"]
            rate = group["lr"]
            if group["bias_correction"]:
                rate *= (1 - two ** group["step"]) ** 0.5 / (1 - one ** group["step"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("FusedAdamW does not support sparse gradients")
                state = self.state[p]
                if "exp_avg" not in state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p, dtype=self.moments[0])
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=self.moments[1])
                first, second = state["exp_avg"], state["exp_avg_sq"]
                first.mul_(one).add_(p.grad.to(first.dtype), alpha=1 - one)
                grad = p.grad.to(second.dtype)
                second.mul_(two).addcmul_(grad, grad, value=1 - two)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(first.to(p.dtype), second.to(p.dtype).sqrt() + group["eps"], value=-rate)
        if is_lazy():
            core.mark_step()
        return loss
