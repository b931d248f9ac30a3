from __future__ import annotations

import csv
import json
import math
import os
import pickle
from pathlib import Path

import pytest
from drivetrain_interfaces import StorageError

from drivetrain.loggers import CSVLogger


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fit(logger, *points, resumed=None):
    """A fit that logs these ``(step, metrics)``."""
    logger.prepare()
    if resumed is not None:
        logger.continue_from(resumed)
    for step, metrics in points:
        logger.log_metrics(metrics, step)
    logger.finalize("success")


def loss(*steps):
    return [(step, {"loss": float(step)}) for step in steps]


def test_one_row_per_step_and_one_column_per_metric(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(logger, (1, {"loss": 0.1}), (1, {"lr": 0.5}), (2, {"loss": 1 / 3}))
    assert rows(logger.path) == [
        {"step": "1", "loss": "0.1", "lr": "0.5"},
        {"step": "2", "loss": repr(1 / 3), "lr": ""},
    ]
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_a_later_column_is_added_to_the_whole_file(tmp_path):
    logger = CSVLogger(tmp_path, flush_every_n_rows=1)
    fit(logger, *loss(1, 2), (3, {"val_loss": 9.0}), *loss(4))
    assert rows(logger.path) == [
        {"step": "1", "loss": "1.0", "val_loss": ""},
        {"step": "2", "loss": "2.0", "val_loss": ""},
        {"step": "3", "loss": "", "val_loss": "9.0"},
        {"step": "4", "loss": "4.0", "val_loss": ""},
    ]
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_rows_wait_in_memory_until_there_are_enough(tmp_path):
    logger = CSVLogger(tmp_path, flush_every_n_rows=3, flush_after_seconds=1e9)
    logger.prepare()
    for step, metrics in loss(1, 2, 3):
        logger.log_metrics(metrics, step)
    assert not os.path.exists(logger.path)
    logger.log_metrics({"loss": 4.0}, 4)
    assert len(rows(logger.path)) == 3  # the newest row waits for metrics of the same step
    logger.log_metrics({"lr": 0.5}, 4)
    logger.save()
    assert rows(logger.path)[-1] == {"step": "4", "loss": "4.0", "lr": "0.5"}


def test_rows_do_not_wait_longer_than_allowed(tmp_path):
    logger = CSVLogger(tmp_path, flush_after_seconds=-1.0)
    logger.prepare()
    logger.log_metrics({"loss": 1.0}, 1)
    logger.log_metrics({"loss": 2.0}, 2)
    assert len(rows(logger.path)) == 1


def test_a_resumed_fit_goes_on_without_repeating_rows(tmp_path):
    fit(CSVLogger(tmp_path), *loss(1, 2, 3, 4))
    logger = CSVLogger(tmp_path)
    fit(logger, (3, {"loss": 30.0}), (4, {"acc": 40.0}), resumed=2)
    assert rows(logger.path) == [
        {"step": "1", "loss": "1.0", "acc": ""},
        {"step": "2", "loss": "2.0", "acc": ""},
        {"step": "3", "loss": "30.0", "acc": ""},
        {"step": "4", "loss": "", "acc": "40.0"},
    ]
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_what_is_owed_at_the_resumed_step_joins_its_row(tmp_path):
    fit(CSVLogger(tmp_path), (1, {"loss": 1.0, "val_loss": 0.25}))
    logger = CSVLogger(tmp_path)
    fit(logger, (1, {"loss_epoch": 3.0}), (2, {"loss": 2.0}), resumed=1)
    assert rows(logger.path) == [
        {"step": "1", "loss": "1.0", "val_loss": "0.25", "loss_epoch": "3.0"},
        {"step": "2", "loss": "2.0", "val_loss": "", "loss_epoch": ""},
    ]


def test_a_row_that_was_cut_off_by_a_kill_is_dropped(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(logger, *loss(11, 12))
    with open(logger.path, "a", encoding="utf-8") as file:
        file.write("1")  # the beginning of "13,13.0"
    fit(CSVLogger(tmp_path), *loss(13), resumed=12)
    assert [row["step"] for row in rows(logger.path)] == ["11", "12", "13"]


def test_a_new_fit_puts_earlier_files_aside(tmp_path):
    for number in (1, 2, 3):
        logger = CSVLogger(tmp_path)
        logger.prepare()
        logger.log_hyperparams({"number": number})
        logger.log_metrics({"loss": float(number)}, 1)
        logger.finalize("success")
    assert sorted(os.listdir(tmp_path)) == [
        "hparams-1.json",
        "hparams-2.json",
        "hparams.json",
        "metrics-1.csv",
        "metrics-2.csv",
        "metrics.csv",
    ]
    assert [row["loss"] for row in rows(tmp_path / "metrics-1.csv")] == ["1.0"]
    assert json.loads((tmp_path / "hparams.json").read_text()) == {"number": 3}


def test_a_second_fit_of_the_same_logger_has_a_file_of_its_own(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(logger, *loss(1, 2))
    fit(logger, (1, {"other": 5.0}))
    assert rows(logger.path) == [{"step": "1", "other": "5.0"}]
    assert len(rows(tmp_path / "metrics-1.csv")) == 2


@pytest.mark.parametrize("same", [True, False])
def test_an_evaluation_by_itself_is_appended_at_once(tmp_path, same):
    logger = CSVLogger(tmp_path)
    fit(logger, *loss(1, 2))
    logger = logger if same else CSVLogger(tmp_path)
    logger.log_metrics({"test_acc": 0.5}, 2)
    assert rows(logger.path)[-1] == {"step": "2", "loss": "", "test_acc": "0.5"}
    assert len(rows(logger.path)) == 3
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_hyperparameters_are_json_that_people_can_read(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.prepare()
    logger.log_hyperparams({"lr": 0.1, "path": Path("x"), "layers": [1, 2]})
    logger.finalize("success")
    assert json.loads((tmp_path / "hparams.json").read_text()) == {
        "lr": 0.1,
        "path": repr(Path("x")),
        "layers": [1, 2],
    }


def test_a_fit_that_logs_nothing_writes_nothing(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.prepare()
    logger.log_hyperparams({})
    logger.finalize("success")
    assert os.listdir(tmp_path) == []


def test_values_that_are_not_finite_are_written(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(logger, (1, {"a": math.nan, "b": math.inf}))
    assert rows(logger.path) == [{"step": "1", "a": "nan", "b": "inf"}]


def test_names_with_commas_and_quotes_survive(tmp_path):
    logger = CSVLogger(tmp_path, flush_every_n_rows=1)
    fit(logger, (1, {'a,"b"': 1.0}), (2, {"c": 2.0}))
    assert rows(logger.path)[0] == {"step": "1", 'a,"b"': "1.0", "c": ""}


def test_folders_of_versions_are_made_only_when_asked_for(tmp_path):
    assert CSVLogger(tmp_path).log_dir == str(tmp_path)
    assert CSVLogger(tmp_path, "run", version=3).log_dir == str(tmp_path / "run" / "version_3")
    assert CSVLogger(tmp_path, version="best").log_dir == str(tmp_path / "csv" / "best")


def test_the_run_directory_is_used_when_no_other_was_given(tmp_path):
    logger, own = CSVLogger(), CSVLogger(tmp_path / "own")
    logger.use_run_dir(str(tmp_path / "run"))
    own.use_run_dir(str(tmp_path / "run"))
    assert logger.log_dir == str(tmp_path / "run")
    assert own.log_dir == str(tmp_path / "own")


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="CSVLogger cannot write to"):
        CSVLogger(tmp_path / "file" / "logs").prepare()


def test_a_directory_that_goes_away_is_an_error_that_says_so(tmp_path):
    logger = CSVLogger(tmp_path / "logs")
    logger.prepare()
    (tmp_path / "logs").rmdir()
    (tmp_path / "logs").touch()
    logger.log_metrics({"loss": 1.0}, 1)
    with pytest.raises(StorageError, match="cannot write to"):
        logger.save()


def test_it_travels_to_another_process(tmp_path):
    logger = pickle.loads(pickle.dumps(CSVLogger(tmp_path)))
    fit(logger, *loss(1))
    assert len(rows(logger.path)) == 1
