"""A compiled step in a whole run: logging goes on, and the result is that of a plain one."""

from __future__ import annotations

import pytest
import torch
from drivetrain import Module, Trainer
from drivetrain_toolkit.compiling import CompileOptions
from drivetrain_toolkit.strategies import SingleDeviceStrategy
from drivetrain_toolkit.tuned import Tuned
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(strategy, folder, **options):
    torch.manual_seed(0)
    x = torch.randn(100, 8)
    data = TensorDataset(x, (x.sum(1) > 0).long())
    module = Classifier()
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy,
        max_epochs=2,
        enable_progress_bar=False,
        default_root_dir=str(folder),
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=16))
    return float(trainer.callback_metrics["loss"]), module.state_dict()


# What torch says when it goes on with a loss after a call that is not compiled.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}])
def test_a_compiled_fused_run_is_that_of_a_plain_one(tmp_path, options):
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    plain, weights = fit(SingleDeviceStrategy(), tmp_path / "plain", **options)
    tuned = Tuned(SingleDeviceStrategy(), compile=CompileOptions(backend=count), fused=True)
    loss, compiled = fit(tuned, tmp_path / "compiled", **options)
    assert loss == pytest.approx(plain, rel=1e-5)
    for name, value in weights.items():
        assert torch.allclose(compiled[name], value, atol=1e-5)
    assert 1 <= len(graphs) <= 4, "not one for each of fourteen batches"
