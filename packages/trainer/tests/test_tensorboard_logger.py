from __future__ import annotations

import importlib.util
import os
import pickle

import pytest
from drivetrain_interfaces import NotFoundError, StorageError

from drivetrain.loggers import TensorBoardLogger
from drivetrain.loggers import tensorboard as logger_module

pytest.importorskip("tensorboard")


def read(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(directory)
    events.Reload()
    return events


def scalars(directory, name):
    return [(event.step, event.value) for event in read(directory).Scalars(name)]


def test_metrics_come_back_from_the_event_file(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.prepare()
    for step in (1, 2, 3):
        logger.log_metrics({"loss": step / 2, "acc": 1.0}, step)
    logger.finalize("success")
    assert logger.log_dir == str(tmp_path / "tensorboard")
    assert scalars(logger.log_dir, "loss") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert len(scalars(logger.log_dir, "acc")) == 3


def test_save_writes_without_closing(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()
    assert scalars(logger.log_dir, "loss") == [(1, 1.0)]
    logger.finalize("success")


def test_a_resumed_fit_hides_the_steps_that_it_repeats(tmp_path):
    first = TensorBoardLogger(tmp_path)
    for step in (1, 2, 3, 4):
        first.log_metrics({"loss": float(step)}, step)
    first.finalize("failed")
    second = TensorBoardLogger(tmp_path)
    second.continue_from(2)
    for step in (3, 4, 5):
        second.log_metrics({"loss": 10.0 * step}, step)
    second.finalize("success")
    second.log_metrics({"test": 1.0}, 5)  # a third file, which hides nothing
    second.finalize("success")
    assert scalars(second.log_dir, "loss") == [(1, 1), (2, 2), (3, 30), (4, 40), (5, 50)]
    assert scalars(second.log_dir, "test") == [(5, 1)]


def test_hyperparameters_are_a_text(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    events = read(logger.log_dir)
    (event,) = events.Tensors("hyperparameters/text_summary")
    assert b'"lr": 0.1' in event.tensor_proto.string_val[0]


def test_without_anything_to_log_no_file_is_written(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.prepare()
    logger.log_hyperparams({})
    logger.finalize("success")
    assert os.listdir(logger.log_dir) == []


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(logger_module, "find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match=r'pip install "drivetrain\[tensorboard\]"'):
        TensorBoardLogger()
    assert importlib.util.find_spec("tensorboard") is not None


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="TensorBoardLogger cannot write to"):
        TensorBoardLogger(tmp_path / "file").prepare()


def test_folders_of_versions_are_made_only_when_asked_for(tmp_path):
    logger = TensorBoardLogger(tmp_path, version=2)
    assert logger.log_dir == str(tmp_path / "tensorboard" / "version_2")


def test_it_travels_to_another_process_with_its_writer_open(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    copy = pickle.loads(pickle.dumps(logger))
    copy.log_metrics({"loss": 2.0}, 2)
    copy.finalize("success")
    logger.finalize("success")
    assert sorted(scalars(logger.log_dir, "loss")) == [(1, 1.0), (2, 2.0)]
