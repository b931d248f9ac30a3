"""Fused clipping: L2, one format, in place; it goes over its argument twice."""

from __future__ import annotations

import torch


class FusedClipNorm:
    def __init__(self, parameters, max_norm):
        self.max_norm = max_norm
        self.limit = torch.tensor(float(max_norm), device="hpu")  # opens the device

    def clip_norm(self, parameters):
        # As the vendor's: an iterator is used up by the first pass, and nothing is clipped.
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:
            return torch.zeros((), device="hpu")
        if len({grad.dtype for grad in grads}) > 1:
            raise RuntimeError("FusedClipNorm takes gradients of one dtype")
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
        factor = torch.clamp(self.limit / (norm + 1e-6), max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return norm
