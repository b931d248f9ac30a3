"""Each level of apex trains a model from the first batch to the last, in the format it meant."""

from __future__ import annotations

import warnings

import pytest
import torch
from drivetrain import FunctionalModule, Trainer
from drivetrain.plugins import ApexMixedPrecisionPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def loss_of(net, batch):
    return nn.functional.cross_entropy(net(batch[0]).float(), batch[1])


def fit(folder, precision, **options):
    torch.manual_seed(0)
    x = torch.randn(128, 8)
    data = TensorDataset(x, (x.sum(1) > 0).long())
    net = network()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=6,
        enable_progress_bar=False,
        logger=False,
        default_root_dir=str(folder),
        gradient_clip_val=1.0,
        **precision,
        **options,
    )
    module = FunctionalModule(
        net, training_step=loss_of, optimizer=lambda p: torch.optim.SGD(p, lr=0.2)
    )
    trainer.fit(module, DataLoader(data, batch_size=16))
    assert trainer.global_step == 48
    trained = network()  # the fitted one may go on casting what it gets
    trained.load_state_dict(net.state_dict())
    with torch.no_grad():
        return float(loss_of(trained.eval(), data[:]))


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_each_level_of_apex_trains_as_well_as_full_precision(tmp_path, level):
    full = fit(tmp_path / "full", {"precision": "32-true"})
    with pytest.warns(UserWarning, match="apex.amp does not exist"):
        plugin = ApexMixedPrecisionPlugin(level, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = fit(tmp_path / level, {"plugins": [plugin]})
    assert loss < 0.2
    assert loss == pytest.approx(full, abs=0.03)
