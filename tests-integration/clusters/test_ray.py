"""On a real Ray with one node, in a host of its own: actors are ranks, and state comes back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}


@pytest.fixture(scope="module")
def ray_words(two_hosts):
    """Starts a head with four cores; gives what a command has to begin with to run beside it."""
    pytest.importorskip("ray", reason="Ray is not installed: nox -s engines")
    program = shutil.which("ray", path=str(Path(sys.executable).parent))
    head = subprocess.Popen(
        two_hosts.on(
            "hostb",
            *(program, "start", "--head", "--num-cpus=4", "--block", "--port=6399"),
            *("--node-ip-address=10.77.9.1", "--include-dashboard=false"),
            "--disable-usage-stats",
        ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield lambda *words: two_hosts.on("hostb", *words)
    head.terminate()
    try:
        head.wait(timeout=60)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()


@pytest.fixture
def ready(ray_words, run, tmp_path, until):
    """Commands once the cluster answers."""
    ask = "import ray; ray.init(address='10.77.9.1:6399'); print(ray.cluster_resources()['CPU'])"

    def answers():
        done = run(ray_words(sys.executable, "-c", ask), tmp_path, QUIET, good=False)
        return "4.0" in done.stdout

    until(answers, "a cluster of Ray", 300)
    return ray_words


SETTINGS = json.dumps({"address": "10.77.9.1:6399"})


def test_actors_are_ranks_and_the_result_comes_back(ready, run, tmp_path, values):
    words = ready(sys.executable, str(HERE / "sent.py"), "RayLauncher", SETTINGS, "1")
    said = run(words, tmp_path, QUIET)
    assert values(said.stdout) == [[2, 1, "ray", "10.77.9.1"]]


def test_a_failure_of_an_actor_comes_back(ready, run, tmp_path):
    words = ready(sys.executable, str(HERE / "sent.py"), "RayLauncher", SETTINGS, "1", "fail")
    done = run(words, tmp_path, QUIET, good=False)
    assert done.returncode == 1
    assert "rank 1 raised ValueError: bad luck" in done.stderr


def test_a_second_fit_works(ready, run, tmp_path, values):
    twice = HERE.parent / "scripts" / "twice.py"
    env = {**QUIET, "RAY_ADDRESS": "10.77.9.1:6399"}
    said = run(ready(sys.executable, str(twice), "ray"), tmp_path, env)
    expected = run([sys.executable, str(twice), "script"], tmp_path)
    assert values(said.stdout) == values(expected.stdout)
