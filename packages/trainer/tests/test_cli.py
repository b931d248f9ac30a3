"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
from drivetrain_interfaces.errors import NonFiniteLossError

from drivetrain import cli

TINY = """
import os

import torch
from drivetrain import Callback, DataModule, Module


class Tiny(Module):
    def __init__(self, rate: float = 0.1):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.rate = rate

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.layer(batch[0])

    def loss(self, batch):
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class Data(DataModule):
    def __init__(self, size: int = 32):
        super().__init__()
        x = torch.linspace(-1, 1, size * 4).reshape(size, 4)
        self.set = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))

    def loader(self):
        return torch.utils.data.DataLoader(self.set, batch_size=4)

    train_dataloader = val_dataloader = predict_dataloader = loader


class Shout(Callback):
    def __init__(self, word: str = "hey"):
        self.word = word

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 1:
            print("started", flush=True)

    def on_fit_end(self, trainer, module):
        weight = module.layer.weight.sum().item()
        line = (f"{self.word} rank {trainer.world.rank} of {trainer.world.size}: "
                f"{trainer.global_step} steps, rate {module.rate}, {weight:.6f}")
        # In one piece, since two processes write.
        os.write(1, f"{line}\\n".encode()) if trainer.world.size > 1 else print(line)
"""

RUN = """
seed_everything: 7
trainer:
  accelerator: cpu
  max_epochs: 2
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
  - class_path: tiny.Shout
    init_args:
      word: hello
model:
  class_path: tiny.Tiny
  init_args:
    rate: 0.05
data:
  class_path: tiny.Data
"""


@pytest.fixture
def project(tmp_path):
    """A directory with a model, data and a file of settings."""
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


@pytest.fixture
def run(project):
    """Runs the command there; returns the finished process."""

    def command(*words, **environ):
        return subprocess.run(
            [sys.executable, "-m", "drivetrain", *words],
            cwd=project,
            env={**os.environ, **environ},
            check=False,
            capture_output=True,
            text=True,
            timeout=90,
        )

    return command


# Looking. In this process: nothing heavy is loaded.


def test_plan_prints_the_record(capsys):
    assert cli.main(["plan", "--accelerator", "cpu", "--devices", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("plan: ddp on cpu")
    assert "\ndevices: 0, 1\n  asked by: devices=2\n" in out


def test_plan_prints_json(capsys):
    assert cli.main(["plan", "--accelerator=cpu", "--precision=bf16", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["precision"] == "bf16-mixed"
    assert plain["backend"] == "cpu"


def test_settings_that_cannot_be_met_are_one_message_and_code_2(capsys):
    words = ["plan", "--accelerator", "cpu", "--devices", "0", "--precision", "17"]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("drivetrain plan: 2 settings cannot be met:\n  1. devices=0 ")
    assert "2. No installed package provides the precision '17'" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [["plan", "--device", "2"], ["plan", "--num_nodes", "two"]])
def test_misspelled_options_and_values_end_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert words[1].lstrip("-") in capsys.readouterr().err


def test_doctor_prints_what_is_installed(capsys):
    assert cli.main(["doctor"]) == 0
    assert "  cpu (drivetrain-cpu " in capsys.readouterr().out


def test_doctor_prints_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    assert "backend" in {one["kind"] for one in json.loads(capsys.readouterr().out)["installed"]}


def test_new_backend_says_what_to_install_where_the_kit_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "drivetrain_conformance", None)  # as if it were not there
    assert cli.main(["new-backend", "acme"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("drivetrain new-backend: A new backend was asked for")
    assert 'pip install "drivetrain-conformance[scaffold]". [DT101]' in err


def test_new_backend_is_left_to_the_kit_where_it_is_installed(monkeypatch):
    given = []
    kit = SimpleNamespace(main=lambda words: given.append(words) or 0)
    monkeypatch.setitem(sys.modules, "drivetrain_conformance", SimpleNamespace(scaffold=kit))
    monkeypatch.setitem(sys.modules, "drivetrain_conformance.scaffold", kit)
    assert cli.main(["new-backend", "acme", "--into", "there"]) == 0
    assert given == [["acme", "--into", "there"]]


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"drivetrain {metadata.version('drivetrain')}\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(words, capsys):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("fit", "validate", "test", "predict", "plan", "doctor"))


def test_an_unknown_command_is_refused_with_those_that_exist(capsys):
    assert cli.main(["fti"]) == 2
    err = capsys.readouterr().err
    assert "no command 'fti'" in err
    assert "  fit " in err


def test_plan_and_doctor_load_no_torch(tmp_path):
    code = (
        "import sys\n"
        "from drivetrain.cli import main\n"
        "main(['plan']), main(['doctor']), main(['--version'])\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# Running. In this process where one is enough: importing torch again takes seconds.


@pytest.fixture
def main(project, monkeypatch, capsys):
    """Runs the command there in this process; returns the exit code and what it printed."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "tiny", raising=False)

    def command(*words):
        code = cli.main(words)
        return code, *capsys.readouterr()

    yield command
    sys.modules.pop("tiny", None)


def test_fit_trains_from_a_file_and_words_override_it(main):
    code, out, _ = main("fit", "--config", "run.yaml", "--trainer.max_epochs", "1")
    assert code == 0
    assert "hello rank 0 of 1: 8 steps, rate 0.05," in out


def test_the_seed_decides_the_result(main):
    results = [
        main("fit", "--config", "run.yaml", f"--seed_everything={seed}")[1].splitlines()[-1]
        for seed in (7, 7, 8)
    ]
    assert results[0] == results[1] != results[2]


def test_predict_goes_through_all_batches(main):
    code, out, _ = main("predict", "--config", "run.yaml")
    assert code == 0
    assert out == "8 batches were predicted; a callback can write them.\n"


def test_print_config_shows_every_setting_and_runs_nothing(main, capsys):
    with pytest.raises(SystemExit) as caught:
        main("fit", "--config", "run.yaml", "--print_config")
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "rate: 0.05" in out
    assert "accumulate_grad_batches: 1" in out
    assert "hello rank" not in out


def test_a_run_without_a_model_is_refused(main, capsys):
    with pytest.raises(SystemExit) as caught:
        main("fit", "--trainer.max_epochs", "1")
    assert caught.value.code == 2
    assert "model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny.Shot", "tinny.Shout", "Shout"])
def test_a_class_path_that_leads_nowhere_is_refused(name, main, project):
    settings = (project / "run.yaml").read_text().replace("tiny.Shout", name)
    (project / "run.yaml").write_text(settings)
    code, _, err = main("fit", "--config", "run.yaml")
    assert code == 2
    assert err.startswith(f"drivetrain fit: class_path={name!r} with")


def test_a_failure_of_the_run_itself_has_code_1(main, monkeypatch):
    from drivetrain import Trainer

    def fails(self, *args, **kwargs):
        raise NonFiniteLossError("The loss is not finite.", "Lower the rate.")

    monkeypatch.setattr(Trainer, "fit", fails)
    code, out, err = main("fit", "--config", "run.yaml")
    assert (code, out) == (1, "")
    assert err == "drivetrain fit: The loss is not finite. Lower the rate. [DT301]\n"


def test_an_error_of_the_user_s_code_keeps_its_traceback(main, monkeypatch):
    from drivetrain import Trainer

    monkeypatch.setattr(Trainer, "fit", lambda self, *args, **kwargs: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main("fit", "--config", "run.yaml")


def test_settings_of_a_run_that_cannot_be_met_are_one_message(run):
    done = run("fit", "--config", "run.yaml", "--trainer.devices", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("drivetrain fit: devices=0 was asked of the 'cpu' backend")
    assert "Traceback" not in done.stderr


def test_fit_works_where_each_rank_runs_the_command_again(run):
    done = run("fit", "--config", "run.yaml", "--trainer.devices=2", "--trainer.launcher=script")
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("hello"))
    assert [line.split(":")[0] for line in lines] == ["hello rank 0 of 2", "hello rank 1 of 2"]
    assert lines[0].split(":")[1] == lines[1].split(":")[1]


def test_validate_prints_the_metrics_once(run):
    done = run("validate", "--config", "run.yaml", "--trainer.devices=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val_loss ") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_128_plus_its_number(project, number):
    words = ["fit", "--config", "run.yaml", "--trainer.max_epochs", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "drivetrain", *words],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(timeout=10)
    assert process.returncode == 128 + number, err
