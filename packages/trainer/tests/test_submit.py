"""``drivetrain submit``: what it writes, shows, refuses and runs. The batch system is made up."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest
from drivetrain_interfaces import JobFile, JobRequest

from drivetrain import submit as module
from drivetrain.cli import main


class Farm:
    name = "farm"
    jobs: list[JobRequest] = []  # noqa: RUF012 - one for the test

    def write(self, job):
        self.jobs.append(job)
        return JobFile(f"run {job.nodes}\n", ".farm")

    def command(self, path):
        return (sys.executable, "-c", f"import sys; sys.exit(open({path!r}).read() != 'run 2\\n')")


@pytest.fixture(autouse=True)
def farm(monkeypatch, tmp_path):
    made = type(sys)("made_up_submitters")
    made.FARM = Farm()
    monkeypatch.setitem(sys.modules, "made_up_submitters", made)
    point = metadata.EntryPoint("farm", "made_up_submitters:FARM", module.SUBMITTERS)
    real = metadata.entry_points

    def points(**wanted):
        return [point] if wanted.get("group") == module.SUBMITTERS else real(**wanted)

    monkeypatch.setattr(metadata, "entry_points", points)
    monkeypatch.chdir(tmp_path)
    Farm.jobs.clear()


def test_the_file_is_written_and_shown_and_nothing_is_submitted(capsys, tmp_path):
    words = ["submit", "farm", "--nodes", "2", "--processes=4", "--option=--queue=x"]
    assert main([*words, "--name", "digits", "--", "python", "train.py", "--nodes", "9"]) == 0
    assert (tmp_path / "digits.farm").read_text() == "run 2\n"
    out = capsys.readouterr().out
    assert out.startswith("# digits.farm\nrun 2\n")
    assert "Nothing was submitted. Add --go, or run:" in out
    (job,) = Farm.jobs
    assert job.command == ("python", "train.py", "--nodes", "9"), "what is after -- is the command"
    assert (job.nodes, job.processes, job.options) == (2, 4, ("--queue=x",))


def test_go_submits_it(capsys):
    assert main(["submit", "farm", "--nodes=2", "--go", "--", "true"]) == 0
    assert "Nothing was submitted" not in capsys.readouterr().out


def test_a_refusal_of_the_manager_is_a_failure(capsys):
    assert main(["submit", "farm", "--nodes=3", "--go", "--", "true"]) == 1
    assert "ended with exit code 1; the job was not submitted" in capsys.readouterr().err


def test_another_file_is_not_replaced_unless_that_is_said(capsys, tmp_path):
    file = tmp_path / "job.txt"
    file.write_text("mine")
    words = ["submit", "farm", "--file=job.txt"]
    assert main([*words, "--", "true"]) == 2
    assert "that file is there and is different" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert main([*words, "--overwrite", "--", "true"]) == 0
    assert main([*words, "--", "true"]) == 0, "the same file may be written again"


def test_an_unknown_manager_is_an_error_with_the_nearest(capsys):
    assert main(["submit", "fram", "--", "true"]) == 2
    assert "Use 'farm', the nearest name." in capsys.readouterr().err


def test_a_missing_folder_is_an_error(capsys):
    assert main(["submit", "farm", "--file=no/where.sh", "--", "true"]) == 1
    assert "DT402" in capsys.readouterr().err


def test_a_missing_program_is_named(capsys, monkeypatch):
    monkeypatch.setattr(Farm, "command", lambda self, path: ("farm-submit", path))
    assert main(["submit", "farm", "--go", "--", "true"]) == 2
    assert "no program 'farm-submit' here" in capsys.readouterr().err
