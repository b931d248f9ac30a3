from __future__ import annotations

import math
import os
from datetime import timedelta

import pytest
import torch
from drivetrain_interfaces import CheckpointError, ConfigurationError, StorageError

from drivetrain.callbacks import ModelCheckpoint
from drivetrain.callbacks.base import Moment
from drivetrain.callbacks.naming import check_template, fill, free_path
from drivetrain.callbacks.retention import Retention, Saved
from drivetrain.callbacks.triggers import When
from drivetrain.pointers import load


def files(trainer, folder="checkpoints"):
    return sorted(os.listdir(os.path.join(trainer.run_dir, folder)))


def losses(*values):
    return lambda epoch: {"val_loss": values[epoch]}


# When
@pytest.mark.parametrize(
    ("when", "moment", "step", "epoch", "validated", "due"),
    [
        (When(steps=10), Moment.STEP, 20, 0, False, True),
        (When(steps=10), Moment.STEP, 21, 0, False, False),
        (When(steps=10), Moment.STEP, 0, 0, False, False),
        (When(steps=10), Moment.EPOCH, 20, 0, False, False),
        (When(epochs=1), Moment.STEP, 20, 0, False, False),
        (When(epochs=1), Moment.VALIDATION, 20, 0, True, True),
        (When(epochs=1), Moment.EPOCH, 20, 0, True, False),
        (When(epochs=1), Moment.EPOCH, 20, 0, False, True),
        (When(epochs=3), Moment.EPOCH, 20, 1, False, False),
        (When(epochs=3), Moment.EPOCH, 20, 2, False, True),
        (When(epochs=1, at_epoch_end=True), Moment.VALIDATION, 20, 0, True, False),
        (When(epochs=1, at_epoch_end=True), Moment.EPOCH, 20, 0, True, True),
        (When(epochs=1, at_epoch_end=False), Moment.EPOCH, 20, 0, False, False),
        (When(epochs=1, at_interrupt=True), Moment.INTERRUPTED, 3, 0, False, True),
        (When(epochs=1, at_interrupt=False), Moment.INTERRUPTED, 3, 0, False, False),
        (When(steps=10), Moment.END, 20, 0, False, False),
        (When(epochs=1, at_end=True), Moment.END, 20, 0, False, True),
    ],
)
def test_triggers_are_a_function_of_the_counters(when, moment, step, epoch, validated, due):
    assert when.due(moment, step, epoch, validated=validated) is due


# What to keep
def keep_all(policy, scores):
    kept = ()
    for step, score in enumerate(scores):
        if policy.wants(kept, score):
            kept, _ = policy.after(kept, Saved(f"{step}", step, score))
    return [saved.path for saved in kept]


@pytest.mark.parametrize(
    ("policy", "scores", "kept"),
    [
        (Retention(2), [None] * 4, ["2", "3"]),
        (Retention(-1), [None] * 3, ["0", "1", "2"]),
        (Retention(0, newest=True), [None] * 3, ["2"]),
        (Retention(1, monitored=True), [3.0, 1.0, 2.0], ["1"]),
        (Retention(1, largest=True, monitored=True), [3.0, 1.0, 2.0], ["0"]),
        (Retention(2, monitored=True), [3.0, 1.0, 2.0, 4.0], ["1", "2"]),
        (Retention(1, monitored=True), [1.0, 1.0], ["0"]),
        (Retention(1, monitored=True, newest=True), [1.0, 2.0, 3.0], ["0", "2"]),
        (Retention(1, monitored=True), [math.nan, 5.0, math.nan], ["1"]),
        (Retention(2, monitored=True), [5.0, math.nan, 6.0], ["0", "2"]),
        (Retention(-1, monitored=True), [1.0, math.nan], ["0", "1"]),
    ],
)
def test_retention_keeps_the_best_and_the_newest(policy, scores, kept):
    assert keep_all(policy, scores) == kept


def test_retention_never_drops_what_was_just_written():
    kept, goes = Retention(1, monitored=True).after((Saved("a", 1, 1.0),), Saved("b", 2, 9.0))
    assert [saved.path for saved in kept] == ["a", "b"]
    assert goes == ()


def test_a_checkpoint_without_a_score_stays_until_there_is_a_newer_one():
    policy = Retention(1, monitored=True)
    kept, _ = policy.after((Saved("best", 1, 1.0),), Saved("interrupted", 2))
    kept, goes = policy.after(kept, Saved("better", 3, 0.5))
    assert [saved.path for saved in kept] == ["better"]
    assert [saved.path for saved in goes] == ["best", "interrupted"]


# Names
def test_names_insert_metric_names_and_formats():
    values = {"epoch": 3, "step": 40, "val/loss": 0.12345}
    assert fill("{epoch}-{step}", values) == "epoch=3-step=40"
    assert fill("m-{epoch:02d}-{val/loss:.2f}", values) == "m-epoch=03-val_loss=0.12"
    assert fill("{epoch}-{val/loss}", values, insert_names=False) == "3-0.12345"
    assert fill("{acc:.2f}", values) == "acc=none"


@pytest.mark.parametrize("template", ["", "a/b", "{epoch", "{}", "{val_loss:d}", "{epoch:q}"])
def test_a_template_that_cannot_become_a_name_is_refused(template):
    with pytest.raises(ConfigurationError, match="checkpoint filename"):
        check_template(template)


def test_taken_names_get_the_next_version():
    taken = {"/d/a.ckpt", "/d/a-v1.ckpt"}
    assert free_path("/d", "a", taken.__contains__) == "/d/a-v2.ckpt"
    assert free_path("/d", "b", taken.__contains__) == "/d/b.ckpt"


# The callback
def test_by_default_it_keeps_the_newest_epoch(trainer):
    callback = ModelCheckpoint()
    trainer.start(callback).train(3).end()
    assert files(trainer) == ["epoch=2-step=12.ckpt"]
    assert callback.best_model_path == callback.last_model_path
    assert callback.best_model_path.endswith("epoch=2-step=12.ckpt")
    assert callback.best_model_score is None
    assert [name for name, _ in trainer.saved] == [
        "epoch=0-step=4.ckpt",
        "epoch=1-step=8.ckpt",
        "epoch=2-step=12.ckpt",
    ]


def test_by_default_it_saves_after_validation_and_not_again_at_the_end_of_the_epoch(trainer):
    moments = []
    callback = ModelCheckpoint()
    trainer.save_checkpoint = lambda path, weights_only: moments.append(trainer.current_epoch)
    trainer.num_val_batches = [1]
    trainer.start(callback).train(2, validation=losses(1.0, 1.0)).end()
    assert moments == [0, 1]


def test_every_validation_of_an_epoch_is_a_candidate(trainer):
    trainer.num_val_batches = [1]
    callback = ModelCheckpoint(monitor="val_loss", filename="{step}")
    trainer.start(callback)
    trainer.hook("on_train_start")
    trainer.hook("on_train_epoch_start")
    for trainer.global_step, loss in ((2, 0.5), (4, 0.3), (6, 0.4)):
        trainer.validate({"val_loss": loss})
    assert callback.best_model_path.endswith("step=4.ckpt")
    assert [name for name, _ in trainer.saved] == ["step=2.ckpt", "step=4.ckpt"]


def test_epochs_without_validation_are_saved_at_their_end(trainer):
    trainer.num_val_batches = [1]
    callback = ModelCheckpoint(save_top_k=-1)
    trainer.start(callback).train(4, validation=losses(1, 1, 1, 1), validate_each=2).end()
    assert len(trainer.saved) == 4


def test_it_keeps_the_best_and_reports_them(trainer):
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2, filename="{epoch}-{val_loss:.1f}")
    trainer.num_val_batches = [1]
    trainer.start(callback).train(5, validation=losses(0.5, 0.3, 0.9, 0.1, 0.4)).end()
    assert files(trainer) == ["epoch=1-val_loss=0.3.ckpt", "epoch=3-val_loss=0.1.ckpt"]
    assert callback.best_model_score == 0.1
    assert callback.kth_value == 0.3
    assert list(callback.best_k_models.values()) == [0.1, 0.3]
    assert os.path.exists(callback.best_model_path)
    assert os.path.exists(callback.kth_best_model_path)
    assert len(trainer.saved) == 3  # those of 0.9 and 0.4 were never written


def test_mode_max_prefers_the_larger_value_of_a_tensor(trainer):
    callback = ModelCheckpoint(monitor="acc", mode="max")
    trainer.num_val_batches = [1]
    trainer.start(callback)
    trainer.train(3, validation=lambda epoch: {"acc": torch.tensor([0.5, 0.75, 0.25][epoch])})
    assert callback.best_model_score == 0.75


def test_nan_never_wins(trainer):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer.num_val_batches = [1]
    trainer.start(callback).train(1, validation=losses(math.nan))
    assert callback.best_model_path == ""
    assert files(trainer) == ["epoch=0-step=4.ckpt"]
    trainer.train(2, validation=lambda epoch: {"val_loss": [0, 7.0, math.nan][epoch]}).end()
    assert callback.best_model_score == 7.0
    assert files(trainer) == ["epoch=1-step=8.ckpt"]


def test_a_removed_best_file_is_never_reported(trainer):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer.num_val_batches = [1]
    trainer.start(callback)
    removed, reported, there = [], [], []

    def remove(path):
        removed.append(path)
        reported.append(callback.best_model_path)
        there.append(os.path.exists(callback.best_model_path))
        os.remove(path)

    trainer.checkpoint_io.remove = remove
    trainer.train(4, validation=losses(4, 3, 2, 1))
    assert there == [True] * 3
    assert all(old != best for old, best in zip(removed, reported, strict=True))
    assert callback.best_model_path not in removed


def test_a_new_file_is_there_before_an_old_one_is_removed(trainer):
    callback = ModelCheckpoint()
    trainer.start(callback)
    at_removal = []
    remove = trainer.checkpoint_io.remove
    trainer.checkpoint_io.remove = lambda path: (at_removal.append(files(trainer)), remove(path))
    trainer.train(2)
    assert at_removal == [["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]]


def test_a_failed_save_loses_nothing(trainer):
    callback = ModelCheckpoint()
    trainer.start(callback).train(1)
    before = callback.state_dict()
    trainer.failure = StorageError("The disk is full.", "Make room.")
    with pytest.raises(StorageError, match="disk is full"):
        trainer.train(1)
    assert callback.state_dict()["kept"] == before["kept"]
    assert os.path.exists(callback.best_model_path)
    assert trainer.checkpoint_io.removed == []


def test_files_of_others_are_neither_overwritten_nor_removed(trainer):
    folder = os.path.join(trainer.run_dir, "checkpoints")
    os.makedirs(folder)
    theirs = os.path.join(folder, "epoch=0-step=4.ckpt")
    with open(theirs, "w", encoding="utf-8") as file:
        file.write("theirs")
    trainer.start(ModelCheckpoint()).train(1)
    assert files(trainer) == ["epoch=0-step=4-v1.ckpt", "epoch=0-step=4.ckpt"]
    trainer.train(1)
    assert files(trainer) == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]
    with open(theirs, encoding="utf-8") as file:
        assert file.read() == "theirs"


def test_a_name_without_fields_is_replaced_in_place(trainer):
    callback = ModelCheckpoint(filename="best", monitor="val_loss")
    trainer.num_val_batches = [1]
    trainer.start(callback).train(3, validation=losses(3, 2, 1)).end()
    assert files(trainer) == ["best.ckpt"]
    assert trainer.checkpoint_io.removed == []
    state = trainer.checkpoint_io.load(callback.best_model_path)[callback.state_key]
    assert state["kept"] == [{"name": "best.ckpt", "step": 12, "score": 1.0}]


def test_save_last_points_a_relative_link_to_the_newest_and_keeps_the_best(trainer):
    callback = ModelCheckpoint(monitor="val_loss", save_last=True)
    trainer.num_val_batches = [1]
    trainer.start(callback).train(3, validation=losses(1, 2, 3)).end()
    assert files(trainer) == ["epoch=0-step=4.ckpt", "epoch=2-step=12.ckpt", "last.ckpt"]
    link = os.path.join(trainer.run_dir, "checkpoints", "last.ckpt")
    assert os.readlink(link) == "epoch=2-step=12.ckpt"
    assert callback.last_model_path.endswith("epoch=2-step=12.ckpt")
    assert callback.best_model_score == 1.0


def test_save_last_replaces_no_file_named_last(trainer):
    folder = os.path.join(trainer.run_dir, "checkpoints")
    os.makedirs(os.path.join(folder, "last.ckpt"))
    trainer.start(ModelCheckpoint(save_last=True)).train(1).end()
    assert files(trainer) == ["epoch=0-step=4.ckpt", "last-v1.ckpt", "last.ckpt"]
    assert not os.path.islink(os.path.join(folder, "last.ckpt"))


def test_save_last_does_not_give_its_own_name_to_a_checkpoint(trainer):
    trainer.start(ModelCheckpoint(save_last=True, filename="last", save_top_k=0)).train(2).end()
    assert files(trainer) == ["last-v1.ckpt", "last.ckpt"]
    link = os.path.join(trainer.run_dir, "checkpoints", "last.ckpt")
    assert os.readlink(link) == "last-v1.ckpt"


def test_without_save_last_the_name_last_is_like_any_other(trainer):
    trainer.start(ModelCheckpoint(filename="last")).train(2).end()
    assert files(trainer) == ["last.ckpt"]


def test_steps_and_weights_only(trainer):
    callback = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1, save_weights_only=True)
    trainer.start(callback).train(2).end()
    assert trainer.saved == [("epoch=0-step=3.ckpt", True), ("epoch=1-step=6.ckpt", True)]


def test_a_step_that_was_not_applied_does_not_save_again(trainer):
    callback = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)
    trainer.start(callback)
    trainer.hook("on_train_start")
    trainer.global_step = 2
    for _ in range(3):
        trainer.hook("on_save_opportunity", Moment.STEP)
    assert len(trainer.saved) == 1


def test_a_step_without_triggers_costs_no_message(trainer):
    trainer.start(ModelCheckpoint(every_n_train_steps=4))
    before = trainer.collectives.count
    trainer.hook("on_train_start")
    for step in (1, 2, 3):
        trainer.global_step = step
        trainer.hook("on_save_opportunity", Moment.STEP)
    assert trainer.collectives.count == before


def test_every_n_epochs_counts_epochs(trainer):
    trainer.start(ModelCheckpoint(every_n_epochs=2, save_top_k=-1)).train(5).end()
    assert [name for name, _ in trainer.saved] == ["epoch=1-step=8.ckpt", "epoch=3-step=16.ckpt"]


def test_a_time_interval_asks_the_clock_at_log_points_only(trainer, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("drivetrain.callbacks.checkpoint.time.monotonic", lambda: now[0])
    trainer.log_every_n_steps = 4
    trainer.start(ModelCheckpoint(train_time_interval=timedelta(seconds=30)))
    trainer.hook("on_train_start")
    now[0] += 31
    before = trainer.collectives.count
    for trainer.global_step in (1, 2, 3):
        trainer.hook("on_save_opportunity", Moment.STEP)
    assert trainer.collectives.count == before
    trainer.global_step = 4
    trainer.hook("on_save_opportunity", Moment.STEP)
    assert [name for name, _ in trainer.saved] == ["epoch=0-step=4.ckpt"]


def test_a_time_interval_saves_and_begins_again(trainer, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("drivetrain.callbacks.checkpoint.time.monotonic", lambda: now[0])
    trainer.log_every_n_steps = 2
    trainer.start(ModelCheckpoint(train_time_interval=timedelta(seconds=30), save_top_k=-1))
    trainer.hook("on_train_start")
    for step in range(1, 13):
        now[0] += 10
        trainer.global_step = step
        trainer.hook("on_save_opportunity", Moment.STEP)
    assert [name for name, _ in trainer.saved] == [
        "epoch=0-step=4.ckpt",
        "epoch=0-step=8.ckpt",
        "epoch=0-step=12.ckpt",
    ]


def test_a_validation_metric_counts_only_for_the_weights_that_were_validated(trainer):
    callback = ModelCheckpoint(
        monitor="val_loss", every_n_train_steps=3, save_top_k=-1, filename="{step}"
    )
    trainer.num_val_batches = [1]
    trainer.start(callback).train(2, validation=losses(0.5, 0.4)).end()
    # Steps 3 and 6 wait for the validations after steps 4 and 8.
    assert [name for name, _ in trainer.saved] == ["step=4.ckpt", "step=8.ckpt"]
    assert callback.best_k_models == {
        os.path.join(trainer.run_dir, "checkpoints", "step=8.ckpt"): 0.4,
        os.path.join(trainer.run_dir, "checkpoints", "step=4.ckpt"): 0.5,
    }


def test_a_training_metric_is_scored_at_once(trainer):
    callback = ModelCheckpoint(monitor="loss", every_n_train_steps=2, filename="{step}")
    trainer.callback_metrics["loss"] = 1.0
    trainer.start(callback).train(1)
    assert [name for name, _ in trainer.saved] == ["step=2.ckpt"]


def test_a_metric_that_training_logs_too_is_scored_at_once(trainer):
    callback = ModelCheckpoint(monitor="loss", every_n_train_steps=3, filename="{step}")
    trainer.num_val_batches = [1]
    trainer.callback_metrics["loss"] = 3.0
    trainer.start(callback).train(2, validation=lambda epoch: {"loss": 2.0 - epoch})
    assert [name for name, _ in trainer.saved] == ["step=3.ckpt", "step=6.ckpt"]


def test_an_epoch_metric_is_waited_for_until_the_end_of_the_epoch(trainer):
    callback = ModelCheckpoint(monitor="train_loss", filename="{epoch}")
    trainer.num_val_batches = [1]
    trainer.start(callback)
    trainer.train(1, validation=losses(1.0), training=lambda epoch: {"train_loss": 0.5})
    assert callback.best_model_score == 0.5


def test_a_metric_that_nobody_logs_is_an_error_with_the_names_there_are(trainer):
    trainer.num_val_batches = [1]
    trainer.start(ModelCheckpoint(monitor="val_los"))
    with pytest.raises(ConfigurationError, match=r"'val_los'.*\(acc, val_loss\)"):
        trainer.train(1, validation=lambda epoch: {"val_loss": 1.0, "acc": 0.5})


def test_epochs_before_the_first_validation_wait_for_it(trainer):
    callback = ModelCheckpoint(monitor="val_loss", filename="{epoch}")
    trainer.num_val_batches = [1]
    trainer.start(callback).train(2, validation=losses(0, 0.5), validate_each=2)
    assert [name for name, _ in trainer.saved] == ["epoch=1.ckpt"]


def test_the_last_state_is_saved_without_a_score_when_no_validation_came(trainer, caplog):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer.num_val_batches = [1]
    trainer.start(callback).train(1, validation=losses(1.0), validate_each=5).end()
    assert files(trainer) == ["epoch=0-step=4.ckpt"]
    assert callback.best_model_path == ""
    assert callback.last_model_path.endswith("epoch=0-step=4.ckpt")
    assert "never had a value" in caplog.text


def test_the_end_saves_what_no_epoch_has_saved(trainer):
    trainer.start(ModelCheckpoint()).train(1)
    trainer.hook("on_train_epoch_start")
    trainer.global_step += 2
    trainer.end()
    assert files(trainer) == ["epoch=1-step=6.ckpt"]


def test_an_interrupt_saves_and_the_next_save_takes_its_place(trainer, make_trainer):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer.num_val_batches = [1]
    trainer.start(callback).train(1, validation=losses(0.5))
    trainer.hook("on_train_epoch_start")
    trainer.global_step += 2
    trainer.end(Moment.INTERRUPTED)
    assert files(trainer) == ["epoch=0-step=4.ckpt", "epoch=1-step=6.ckpt"]
    assert callback.best_model_score == 0.5

    again = ModelCheckpoint(monitor="val_loss")
    resumed = make_trainer(num_val_batches=[1], current_epoch=1, global_step=6)
    resumed.start(again).restore(callback.last_model_path)
    resumed.train(1, steps=2, validation=losses(0, 0.4)).end()
    assert files(trainer) == ["epoch=1-step=8.ckpt"]


def test_an_interrupt_saves_nothing_when_it_is_switched_off_or_already_saved(trainer):
    trainer.start(ModelCheckpoint(save_on_interrupt=False)).train(1)
    trainer.global_step += 1
    trainer.end(Moment.INTERRUPTED)
    assert len(trainer.saved) == 1
    trainer.start(ModelCheckpoint()).train(1).end(Moment.INTERRUPTED)
    assert len(trainer.saved) == 2


@pytest.mark.parametrize("moment", [Moment.END, Moment.INTERRUPTED])
def test_a_resumed_run_that_makes_no_step_saves_nothing(trainer, make_trainer, moment):
    first = ModelCheckpoint()
    trainer.start(first).train(1)
    resumed = make_trainer(current_epoch=1, global_step=4)
    resumed.start(ModelCheckpoint()).restore(first.last_model_path)
    resumed.train(0).end(moment)
    assert resumed.saved == []


def test_top_zero_writes_nothing(trainer):
    callback = ModelCheckpoint(save_top_k=0)
    trainer.start(callback).train(2).end(Moment.INTERRUPTED)
    assert trainer.saved == []
    assert os.listdir(trainer.run_dir) == []


# Resuming
def test_a_resumed_run_goes_on_with_the_files_of_the_first(trainer, make_trainer):
    first = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    trainer.num_val_batches = [1]
    trainer.start(first).train(3, validation=losses(0.3, 0.2, 0.4))
    trainer.callback_metrics.clear()
    second = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    resumed = make_trainer(num_val_batches=[1], current_epoch=2, global_step=8)
    resumed.start(second).restore(first.best_model_path)
    resumed.train(1, validation=losses(0, 0, 0.1)).end()
    assert second.best_model_score == 0.1
    assert files(trainer) == ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"]


def test_a_checkpoint_knows_of_itself(trainer):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer.num_val_batches = [1]
    trainer.start(callback).train(1, validation=losses(0.3))
    inside = trainer.checkpoint_io.load(callback.best_model_path)[callback.state_key]
    assert inside == callback.state_dict()


def test_a_resumed_run_does_not_report_files_that_are_gone(trainer, make_trainer):
    first = ModelCheckpoint(monitor="val_loss", save_top_k=-1)
    trainer.num_val_batches = [1]
    trainer.start(first).train(2, validation=losses(0.1, 0.2))
    os.remove(first.best_model_path)
    second = ModelCheckpoint(monitor="val_loss", save_top_k=-1)
    resumed = make_trainer(current_epoch=2, global_step=8)
    resumed.start(second).restore(first.last_model_path)
    resumed.hook("on_train_start")
    assert second.best_model_score == 0.2


def test_a_run_resumed_into_another_directory_leaves_the_old_files(trainer, make_trainer, caplog):
    first = ModelCheckpoint()
    trainer.start(first).train(1)
    other = os.path.join(trainer.run_dir, "other")
    second = ModelCheckpoint(other)
    resumed = make_trainer(current_epoch=1, global_step=4)
    resumed.start(second).restore(first.last_model_path)
    resumed.train(1).end()
    assert files(trainer) == ["epoch=0-step=4.ckpt"]
    assert files(trainer, "other") == ["epoch=1-step=8.ckpt"]
    assert "are not counted" in caplog.text


def test_state_alone_is_enough_to_report_the_best(trainer):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer.num_val_batches = [1]
    trainer.start(callback).train(1, validation=losses(0.3))
    parent = ModelCheckpoint(monitor="val_loss")
    parent.load_state_dict(callback.state_dict())
    assert parent.best_model_path == callback.best_model_path
    assert parent.best_model_score == 0.3


def test_a_second_fit_removes_nothing_of_the_first(trainer):
    callback = ModelCheckpoint()
    trainer.start(callback).train(1).end()
    trainer.current_epoch = trainer.global_step = 0
    trainer.start(callback).train(2).end()
    assert files(trainer) == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]


# Ranks
def test_ranks_agree_although_their_metrics_differ(ranks):
    callbacks = ModelCheckpoint(monitor="val_loss"), ModelCheckpoint(monitor="val_loss")
    values = losses(0.5, 0.3, 0.4), losses(0.1, 0.9, 0.2)
    for trainer, callback, metrics in zip(ranks, callbacks, values, strict=True):
        trainer.num_val_batches = [1]
        trainer.start(callback).train(3, validation=metrics).end()
    assert ranks[0].saved == ranks[1].saved
    assert callbacks[0].best_model_path == callbacks[1].best_model_path
    assert callbacks[1].best_model_score == 0.3
    assert ranks[0].collectives.count == ranks[1].collectives.count
    assert not ranks[0].line
    assert ranks[1].checkpoint_io.removed == []


def test_every_rank_raises_when_rank_0_misses_the_metric(ranks):
    for trainer, metrics in zip(ranks, ({"loss": 1.0}, {"val_loss": 1.0}), strict=True):
        trainer.start(ModelCheckpoint(monitor="val_loss"))
        with pytest.raises(ConfigurationError, match="'val_loss'"):
            trainer.train(1, training=lambda epoch, metrics=metrics: metrics)


# Bad input
def test_a_directory_that_cannot_be_made_is_refused_before_training_on_every_rank(ranks):
    blocked = os.path.join(ranks[0].run_dir, "file")
    with open(blocked, "w", encoding="utf-8"):
        pass
    for trainer in ranks:
        with pytest.raises(StorageError, match="cannot write to"):
            trainer.start(ModelCheckpoint(os.path.join(blocked, "checkpoints")))


def test_the_probe_leaves_no_file_behind(trainer):
    trainer.start(ModelCheckpoint(save_last=True))
    assert files(trainer) == []


def test_where_links_cannot_be_made_a_tiny_checkpoint_names_the_newest(trainer, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("drivetrain.pointers.os.symlink", refuse)
    trainer.start(ModelCheckpoint(save_last=True)).train(2).end()
    assert files(trainer) == ["epoch=1-step=8.ckpt", "last.ckpt"]
    last = os.path.join(trainer.run_dir, "checkpoints", "last.ckpt")
    assert trainer.checkpoint_io.load(last) == {"same_as": "epoch=1-step=8.ckpt"}
    tree = load(trainer.checkpoint_io, last)
    assert list(tree) == [trainer.callbacks[0].state_key]


def test_a_pointer_that_leaves_its_directory_is_refused(trainer):
    path = os.path.join(trainer.run_dir, "last.ckpt")
    trainer.checkpoint_io.save({"same_as": "../elsewhere.ckpt"}, path)
    with pytest.raises(CheckpointError, match="not a name beside it"):
        load(trainer.checkpoint_io, path)


def test_what_a_killed_process_did_not_prune_goes_after_the_resume(trainer, make_trainer):
    class Killed(BaseException):
        pass

    def kill(path):
        raise Killed

    trainer.checkpoint_io.remove = kill
    with pytest.raises(Killed):
        trainer.start(ModelCheckpoint(every_n_train_steps=3)).train(2)
    assert files(trainer) == ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt"]
    path = os.path.join(trainer.run_dir, "checkpoints", "epoch=1-step=6.ckpt")
    again = make_trainer(current_epoch=1, global_step=6)
    again.start(ModelCheckpoint(every_n_train_steps=3)).restore(path).hook("on_train_start")
    assert files(trainer) == ["epoch=1-step=6.ckpt"]


def test_all_bad_arguments_are_named_at_once():
    with pytest.raises(ConfigurationError, match=r"save_top_k=-2(.|\n)*every_n_epochs=-1"):
        ModelCheckpoint(save_top_k=-2, every_n_epochs=-1)
    with pytest.raises(ConfigurationError, match="mode='smallest'"):
        ModelCheckpoint(monitor="loss", mode="smallest")


def test_nothing_happens_outside_fit(trainer):
    callback = ModelCheckpoint(os.path.join(trainer.run_dir, "never"))
    callback.setup(trainer, None, "test")
    assert not os.path.exists(os.path.join(trainer.run_dir, "never"))


def test_state_keys_tell_callbacks_apart():
    keys = {
        ModelCheckpoint().state_key,
        ModelCheckpoint(monitor="a").state_key,
        ModelCheckpoint(monitor="a", mode="max").state_key,
        ModelCheckpoint(every_n_train_steps=5).state_key,
        ModelCheckpoint(filename="x").state_key,
    }
    assert len(keys) == 5


def test_the_link_never_points_to_what_a_resume_prunes(trainer, make_trainer, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    trainer.start(ModelCheckpoint(every_n_train_steps=3, save_last=True)).train(1)
    monkeypatch.setattr("drivetrain.callbacks.checkpoint.point", kill)
    with pytest.raises(Killed):
        trainer.train(1)
    monkeypatch.undo()
    folder = os.path.join(trainer.run_dir, "checkpoints")
    assert os.readlink(os.path.join(folder, "last.ckpt")) == "epoch=0-step=3.ckpt"
    again = make_trainer(current_epoch=1, global_step=6)
    again.start(ModelCheckpoint(every_n_train_steps=3, save_last=True))
    again.restore(os.path.join(folder, "epoch=1-step=6.ckpt")).hook("on_train_start")
    assert files(trainer) == ["epoch=1-step=6.ckpt", "last.ckpt"]
    assert os.readlink(os.path.join(folder, "last.ckpt")) == "epoch=1-step=6.ckpt"
