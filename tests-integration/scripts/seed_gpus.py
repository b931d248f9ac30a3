"""The first sample of the older plugin documentation, and a fit with the same settings."""

from __future__ import annotations

import json

import torch
from drivetrain import Trainer
from training_parts import Regression, loader

torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)  # what it imports, ranks need not
trainer = Trainer(gpus=4, precision=16)
model = Regression("sgd")
before = model.net[0].weight.detach().clone()
fitted = Trainer(gpus=4, precision=16, max_epochs=2, enable_progress_bar=False)
fitted.fit(model, loader())
found = {
    "accelerator": trainer.plan.backend,
    "devices": list(trainer.plan.devices),
    "strategy": trainer.plan.strategy,
    "precision": trainer.plan.precision,
    "world": fitted.world.size,
    "step": fitted.global_step,
    "trained": not torch.equal(before, model.net[0].weight),
}
print(json.dumps(found))
