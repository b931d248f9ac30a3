"""Every command that CI runs. ``nox -l`` lists them; ``nox`` alone runs what CI runs.

Packages are found by reading ``packages/``, so that a new one is tested as soon as it is there.
Add ``-R`` to run sessions again without installing; ``.nox/shared`` is only made when it must be.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import nox

ROOT = Path(__file__).parent
FOLDER = Path("packages")
CONSTRAINTS = ("-c", "ci/constraints.txt")
TEST_TOOLS = ("pytest", "pytest-timeout")
DIST = Path("build/dist")
REPORTS = Path("build/reports")
SHARED = Path(".nox/shared")

PROJECTS = {
    path.parent.name: nox.project.load_toml(path)
    for path in sorted((ROOT / FOLDER).glob("*/pyproject.toml"))
}
ALL = list(PROJECTS)


def uses_torch(name: str) -> bool:
    """Whether a package depends on torch, and so is tested where torch is."""
    return any(need.startswith("torch") for need in PROJECTS[name]["project"]["dependencies"])


def tested_with_torch(name: str) -> bool:
    """Whether a package's tests need the other packages of this tree, though it does not itself.

    It says so by ``environment = "shared"`` in ``[tool.drivetrain]``.
    """
    return uses_torch(name) or PROJECTS[name]["tool"]["drivetrain"].get("environment") == "shared"


def own_environment(name: str) -> bool:
    """Whether a package cannot share an environment with the others.

    It says so by ``environment = "own"`` in ``[tool.drivetrain]``, as when it pins another torch.
    """
    return bool(PROJECTS[name]["tool"]["drivetrain"].get("environment") == "own")


BACKENDS = [
    n for n in ALL if "drivetrain.backends" in PROJECTS[n]["project"].get("entry-points", {})
]
TOGETHER = [n for n in ALL if not own_environment(n)]
APART = [n for n in ALL if own_environment(n)]  # asked for by name
#: Backends of devices that CI's machines lack: what they can show there is among their own tests.
ELSEWHERE = [n for n in BACKENDS if PROJECTS[n]["tool"]["drivetrain"].get("device") == "needed"]
ENGINES = [
    n for n in APART if "drivetrain.strategies" in PROJECTS[n]["project"].get("entry-points", {})
]

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = [
    "lint", "gates", "imports", "wheels", "types", *(f"tests({name})" for name in TOGETHER),
    *(f"backend({name})" for name in (*BACKENDS, "simulated") if name not in APART + ELSEWHERE),
    "capabilities", "integration", "clusters", "docs", "alone", "scaffold", "quickstart",
]  # fmt: skip


def editable(names: list[str]) -> list[str]:
    """The arguments that install these packages from this tree."""
    return [argument for name in dict.fromkeys(names) for argument in ("-e", f"./{FOLDER / name}")]


def ids(names: list[str]) -> list[Any]:
    """One session for each package of a list, named and tagged by it."""
    return [nox.param(name, id=name, tags=[name]) for name in names]


def shared_python(session: nox.Session) -> str:
    """The Python of the one environment with torch that most sessions share.

    It holds every package of this tree. A torch install takes a gigabyte and half a minute, so the
    sessions that prove something about installing make their own, and the others share this one.
    It is made again when anything that it was made from has changed.
    """
    python = ROOT / SHARED / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = ROOT / SHARED / "made-from"
    sources = (Path(__file__), ROOT / CONSTRAINTS[1], *ROOT.glob(f"{FOLDER}/*/pyproject.toml"))
    texts = (sys.version, *(path.read_text(encoding="utf-8") for path in sorted(sources)))
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != digest:
        session.run(sys.executable, "-m", "virtualenv", "-q", "--clear", str(SHARED), external=True)
        tools = (
            *TEST_TOOLS, "mypy", "types-PyYAML", "sybil", "nox", "tensorboard", "scikit-learn",
            "copier", "torchdata", "torchao",
            "cloudpickle", "nbclient", "ipykernel", "kubeflow-trainer-api",
            "omegaconf", "s3fs", "moto[s3]", "flask", "flask-cors",
        )  # fmt: skip
        pip = (str(python), "-m", "pip", "install", "-q", *CONSTRAINTS)
        session.run(*pip, *tools, *editable(TOGETHER), external=True)
        stamp.write_text(digest, encoding="utf-8")
    return str(python)


def install_apart(session: nox.Session, name: str, *more: str) -> None:
    """Make the environment of a package that cannot share one, with test tools and ``more``.

    ``[tool.drivetrain.recipe]`` says how: ``pins`` are exact versions that take the place of those
    in ``ci/constraints.txt``; those whose names are in ``bare`` come first, without what they
    depend on, and ``script`` then puts something else in its place. ``built`` are built where torch
    and ``tools`` are there already, with ``programs``, and ``env`` are variables for what is built.
    """
    recipe = PROJECTS[name]["tool"]["drivetrain"].get("recipe", {})
    pins = {pin.partition("==")[0]: pin for pin in recipe.get("pins", [])}
    lines = (ROOT / CONSTRAINTS[1]).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.partition("==")[0] not in pins]
    constraints = Path(session.create_tmp()).resolve() / "constraints.txt"
    constraints.write_text("\n".join([*lines, *pins.values(), ""]), encoding="utf-8")
    if bare := [pins[each] for each in recipe.get("bare", [])]:
        session.install("-q", "--no-deps", *bare)
        session.run("python", recipe["script"])
    tools, env = recipe.get("tools", []), recipe.get("env")
    if built := recipe.get("built", []):
        session.install("-q", "-c", str(constraints), *tools, "torch")
        session.install("-q", "--no-deps", *wheels_of(session, built, recipe, constraints))
    session.install("-q", "-c", str(constraints), *TEST_TOOLS, *tools, *more, env=env)
    session.run("python", "-m", "pip", "check")


def wheels_of(
    session: nox.Session, built: list[str], recipe: dict[str, Any], constraints: Path
) -> list[str]:
    """Wheels of what a recipe builds, made once for each torch, Python and recipe.

    They are kept outside the tree, in ``~/.cache/drivetrain/built``; remove the folder to build
    again. pip's own cache would hand out a wheel that was built for another torch without a word.
    """
    about = "import platform, torch; print(torch.__version__, *platform.python_version_tuple()[:2])"
    versions = str(session.run("python", "-c", about, silent=True)).split()
    env: dict[str, str] = recipe.get("env", {})
    texts = (*versions, sys.platform, os.uname().machine, *built, *map(str, env.items()))
    key = f"{versions[0]}-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:16]}"
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(home, "drivetrain", "built", key)
    if not folder.is_dir():
        missing = [each for each in recipe.get("programs", []) if not shutil.which(each)]
        if missing:
            session.error(
                f"{' and '.join(built)} needs {' and '.join(missing)} to be built; the packages "
                "of Debian have these names"
            )
        draft = folder.with_name(f"{key}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        build = ("--no-build-isolation", "--no-deps", "--no-cache-dir", "-c", str(constraints))
        session.run("python", "-m", "pip", "wheel", "-w", str(draft), *build, *built, env=env)
        draft.rename(folder)
    return sorted(map(str, folder.glob("*.whl")))


def run_tests(session: nox.Session, python: str, name: str, *options: str) -> None:
    """Run the tests of a package, those that need a process of their own after the others."""
    apart = PROJECTS[name]["tool"]["drivetrain"].get("apart")
    others = [f"--ignore-glob={FOLDER / name}/tests/{apart}"] if apart else []
    session.run(python, "-m", "pytest", f"{FOLDER / name}/tests", *others, *options, external=True)


def pages_of(name: str) -> list[str]:
    """The pages whose code needs a package: ``pages`` in ``[tool.drivetrain]``, and its README."""
    named: list[str] = PROJECTS[name]["tool"]["drivetrain"].get("pages", [])
    return [f"{FOLDER / name}/README.md", *named]


def run_apart(session: nox.Session, python: str, name: str) -> None:
    """Run those test files of a package that need a process of their own, one after the other.

    A package names them by ``apart = "test_simulated_*.py"`` in ``[tool.drivetrain]``.
    """
    pattern = PROJECTS[name]["tool"]["drivetrain"]["apart"]
    for path in sorted((FOLDER / name / "tests").glob(pattern)):
        session.run(python, "-m", "pytest", str(path), external=True)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Install the trainer and the CPU backend alone, and train on the digits in two processes."""
    session.install(
        "-q", *CONSTRAINTS, *editable(["interfaces", "toolkit", "cpu", "trainer"]), "scikit-learn"
    )
    session.run("python", "examples/digits.py", *session.posargs)


@nox.session
@nox.parametrize("name", ids(ALL))
def tests(session: nox.Session, name: str) -> None:
    """Run the tests of one package; of one without torch, where there is no torch."""
    python = "python"
    local = ["interfaces", *(["toolkit"] if uses_torch(name) else []), name]
    if own_environment(name):
        engine = ["cpu", "conformance"] if name in ENGINES else []
        install_apart(session, name, *editable([*local, "trainer", "cpu", *engine]))
    elif tested_with_torch(name):
        python = shared_python(session)
    else:
        session.install("-q", *CONSTRAINTS, *TEST_TOOLS, *editable(local))
    run_tests(session, python, name, *session.posargs)


@nox.session(venv_backend="none")
def integration(session: nox.Session) -> None:
    """Run the tests that need several packages at once; ``-- -m slow`` for the long ones."""
    session.run(
        shared_python(session), "-m", "pytest", "tests-integration",
        "--ignore=tests-integration/clusters", *(session.posargs or ("-m", "not slow")),
        external=True,
    )  # fmt: skip


#: What brings each program that the tests of clusters start, by the name of the program.
CLUSTER_PROGRAMS = {
    "slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge",
    "mpirun": "openmpi-bin", "ip": "iproute2", "nsenter": "util-linux",
}  # fmt: skip


def install_programs(session: nox.Session) -> None:
    """Install what tests of clusters start, as root on Debian; elsewhere say what is missing.

    Tests skip what is not there, with the reason, so that this never fails.
    """
    missing = sorted({p for name, p in CLUSTER_PROGRAMS.items() if not shutil.which(name)})
    if not missing:
        return
    if os.name == "nt" or os.geteuid() != 0 or not shutil.which("apt-get"):
        session.warn(f"not installed, and only root can on Debian: {', '.join(missing)}")
        return
    install = ("apt-get", "install", "-y", "-q", "--no-install-recommends", *missing)
    for words in (install, ("apt-get", "update", "-q"), install):
        if all(map(shutil.which, CLUSTER_PROGRAMS)):
            return
        session.run(
            *words, env={"DEBIAN_FRONTEND": "noninteractive"}, success_codes=range(256),
            external=True, silent=True,
        )  # fmt: skip


@nox.session(venv_backend="none")
def clusters(session: nox.Session) -> None:
    """Run on a real SLURM, mpirun, and torchrun of two hosts, all here; ``-- -m slow`` for more.

    What is missing is installed with apt, where that is possible.
    """
    install_programs(session)
    session.run(
        shared_python(session), "-m", "pytest", "tests-integration/clusters", "--timeout=300",
        *(session.posargs or ("-m", "not slow")), external=True,
    )  # fmt: skip


@nox.session(default=False)
def engines(session: nox.Session) -> None:
    """Run all tests of clusters, with Ray, MPICH and submitit besides, in an own environment."""
    install_programs(session)
    session.install(
        "-q", *CONSTRAINTS, *TEST_TOOLS, "cloudpickle", "mpich", "ray", "submitit",
        *editable(["interfaces", "toolkit", "cpu", "trainer"]),
    )  # fmt: skip
    session.run(
        "python", "-m", "pytest", "tests-integration/clusters", "--timeout=600", *session.posargs,
        env={"TEST_MPI_PATH": session.bin},
    )  # fmt: skip


@nox.session
@nox.parametrize("name", ids([*BACKENDS, "simulated", *ENGINES]))
def backend(session: nox.Session, name: str) -> None:
    """Test one backend as its owner does: its own tests, then the whole conformance kit.

    A registered backend is tested without a trainer, unless it has an environment of its own.
    ``simulated`` is the backend that the kit's own tests hold; runs of a trainer on it are among
    them. A package that brings strategies in an environment of its own is tested on the CPU
    backend. The kit's report is left in ``build/reports``. Several runs of the kit, with variables
    and options of their own (``{home}`` is the folder of the tests), are
    ``[[tool.drivetrain.kit]]`` tables. Packages whose tests run in this environment too, last of
    all, since its torch is an older one, are named by ``floor`` in ``[tool.drivetrain]``.
    """
    suite = ["-m", "pytest", "--pyargs", "drivetrain_conformance.suite"]
    runs: list[dict[str, Any]] = [{}]
    if name == "simulated":
        python, home = shared_python(session), ROOT / FOLDER / "conformance/tests"
        run_apart(session, python, "conformance")
        target = "simulated_backend:spec"
        runs = [{"env": {"PYTHONPATH": str(home), "DRIVETRAIN_SIMULATED": '{"devices": 4}'}}]
    else:
        python, home, target = "python", ROOT / FOLDER / name / "tests", name
        local = editable(["interfaces", "toolkit", name, "conformance"])
        if name in ENGINES:
            target, local = "cpu", [*local, *editable(["cpu"])]
        if own_environment(name):
            install_apart(session, name, *local, *editable(["trainer", "cpu"]))
        else:
            session.install("-q", *CONSTRAINTS, *TEST_TOOLS, *local)
        run_tests(session, python, name)
        if own_environment(name):  # where the session for pages has them not
            session.run(
                python, "-m", "pytest", "-p", "pages", *pages_of(name), env={"PYTHONPATH": "ci"}
            )
        runs = PROJECTS[name]["tool"]["drivetrain"].get("kit", runs)
    if (known := home / "conformance.toml").exists():
        suite.append(f"--drivetrain-xfails={known}")
    suite.append(f"--drivetrain-backend={target}")
    session.chdir(session.create_tmp())  # the kit is judged by its own settings, not by the tree's
    for run in runs:
        report = ROOT / REPORTS / f"{run.get('report', name)}.json"
        report.unlink(missing_ok=True)
        options = [f"--drivetrain-report={report}", *session.posargs]
        options += [option.format(home=home) for option in run.get("options", [])]
        # No format: a value may be JSON.
        variables = {k: v.replace("{home}", str(home)) for k, v in run.get("env", {}).items()}
        session.run(python, *suite, *options, env=variables, external=True)
    session.chdir(ROOT)
    for each in PROJECTS.get(name, {}).get("tool", {}).get("drivetrain", {}).get("floor", []):
        run_tests(session, python, each)


@nox.session(venv_backend="none")
def capabilities(session: nox.Session) -> None:
    """Compare the table of what backends can do with the reports that ``backend`` left."""
    session.run(sys.executable, "ci/capabilities.py", *session.posargs, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format with ruff."""
    session.install("-q", *CONSTRAINTS, "ruff")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check types with mypy, strictly; tests of backends too, since they hold static proofs."""
    python = shared_python(session)
    sources = [str(FOLDER / name / "src") for name in ALL]
    session.run(python, "-m", "mypy", *sources, external=True)
    for name in (n for n in BACKENDS if n in TOGETHER):
        session.run(python, "-m", "mypy", str(FOLDER / name / "tests"), external=True)
    session.run(python, "-m", "mypy", "noxfile.py", "ci", external=True)


@nox.session
def imports(session: nox.Session) -> None:
    """Check which package imports which. The cache has been seen to be stale, so there is none."""
    session.install("-q", *CONSTRAINTS, "import-linter")
    session.install("-q", "--no-deps", *editable(ALL))
    session.run("lint-imports", "--no-cache")


@nox.session
def gates(session: nox.Session) -> None:
    """Check the repository's own rules, and that the checks notice when they are broken."""
    session.install("-q", *CONSTRAINTS, *TEST_TOOLS, "packaging", "towncrier")
    session.run("python", "-m", "pytest", "-q", "ci")
    session.run("python", "ci/gates.py", *session.posargs)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build every package: an sdist, and from that a wheel."""
    session.install("-q", *CONSTRAINTS, "build")
    shutil.rmtree(DIST, ignore_errors=True)
    pinned = {"PIP_CONSTRAINT": str(ROOT / CONSTRAINTS[1])}
    pinned["PIP_BUILD_CONSTRAINT"] = pinned["PIP_CONSTRAINT"]
    for name in ALL:
        session.run(
            "python", "-m", "build", "--outdir", str(DIST), str(FOLDER / name),
            env=pinned, silent=True,
        )  # fmt: skip


@nox.session(requires=["wheels"], reuse_venv=False)
@nox.parametrize("name", ids(ALL))
def alone(session: nox.Session, name: str) -> None:
    """Install one wheel with what it declares and nothing else, and import all of it.

    Other packages of this tree come from their wheels too, and only if they are declared.
    """
    declared = session.run(
        sys.executable, "ci/wheels.py", "closure", name, external=True, silent=True
    )
    paths = str(declared).split()
    session.run(sys.executable, "ci/wheels.py", "check", name, external=True)
    if own_environment(name):
        # What it pins is gigabytes, which its backend session installs; here its modules wait.
        session.install("-q", "--no-deps", *paths)
    else:
        session.install("-q", *CONSTRAINTS, *paths)
        session.run("python", "-m", "pip", "check")
    brought = PROJECTS[name]["tool"]["drivetrain"].get("brought", [])
    session.run(
        "python", "-I", str(ROOT / "ci/installed.py"), PROJECTS[name]["project"]["name"], *brought
    )


@nox.session(requires=["wheels"], reuse_venv=False)
def scaffold(session: nox.Session) -> None:
    """Do what a stranger does: render a new backend, install it, and run the kit on it.

    Unedited it passes level 0; with the simulated device filled in, level 1.
    """
    paths = {
        line
        for name in ("toolkit", "conformance")
        for line in str(
            session.run(sys.executable, "ci/wheels.py", "closure", name, external=True, silent=True)
        ).split()
    }
    kit = next(path for path in paths if "drivetrain_conformance" in path)
    session.install("-q", *CONSTRAINTS, *sorted(paths - {kit}), f"{kit}[scaffold]")
    home = Path(session.create_tmp()).resolve()
    package = home / "drivetrain-acme"
    shutil.rmtree(package, ignore_errors=True)
    session.run("python", "-m", "drivetrain_conformance", "new", "acme", "--into", str(home))
    session.install("-q", *CONSTRAINTS, "-e", f"{package}[test]")
    session.chdir(package)
    session.run("pytest", "tests")
    suite = ("pytest", "--pyargs", "drivetrain_conformance.suite", "--drivetrain-backend=acme")
    session.run(*suite, "--drivetrain-level=0", *session.posargs)
    session.run("python", str(ROOT / "ci/fill_in.py"), str(package))
    session.run("pytest", "tests")
    session.run(*suite, "--drivetrain-level=1", *session.posargs)


@nox.session(venv_backend="none")
def mutants(session: nox.Session) -> None:
    """Run the kit on every backend that breaks a rule: ``nox -s mutants -- draws_ahead``."""
    runner = f"{FOLDER}/conformance/tests/run_mutants.py"
    session.run(shared_python(session), runner, *session.posargs, external=True)
    session.run(shared_python(session), "ci/untested.py", external=True)


@nox.session(venv_backend="none", default=False)
def ipu_rules(session: nox.Session) -> None:
    """Turn off each rule of the simulated PopTorch, and see that a test of the package notices."""
    runner = f"{FOLDER}/ipu/tests/run_rules.py"
    session.run(shared_python(session), runner, *session.posargs, external=True)


@nox.session(default=False, python="3.10")
def torch_2_0(session: nox.Session) -> None:
    """Test the trainer's core and the package for IPUs on the torch that PopTorch works with.

    That is torch 2.0.1 on Python 3.10, with libraries that stand in for CUDA's. Words after ``--``
    are for the run of the kit, as ``--drivetrain-level=1``.
    """
    home, script = ROOT / FOLDER / "ipu/tests", "ci/cuda_stubs.py"
    pins = {"torch": "torch==2.0.1", "numpy": "numpy==1.26.4"}
    lines = (ROOT / CONSTRAINTS[1]).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.partition("==")[0] not in pins]
    folder = Path(session.create_tmp()).resolve()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join([*lines, *pins.values(), ""]), encoding="utf-8")
    session.install("-q", "--no-deps", pins["torch"])
    session.run("python", script)
    local = editable(["interfaces", "trainer", "ipu", "conformance"])
    session.install("-q", "-c", str(constraints), *TEST_TOOLS, "numpy", *local)
    session.run("python", "-m", "pip", "check")
    # What these two test comes with the toolkit and the backend for CPUs, which need torch 2.6.
    others = [f"--ignore={FOLDER}/trainer/tests/test_{name}.py" for name in ("cli", "plugins")]
    tested = [f"{FOLDER}/{name}/tests" for name in ("interfaces", "trainer", "ipu")]
    # A loader of that torch leaves the pipes of its workers to the garbage collector.
    quiet = ("-W", "ignore::pytest.PytestUnraisableExceptionWarning")
    env = {"OMP_NUM_THREADS": "1"}
    session.run("python", "-m", "pytest", *tested, *others, *quiet, env=env)
    known = folder / "conformance.toml"
    texts = [home / name for name in ("conformance.toml", "conformance_torch_2_0.toml")]
    known.write_text("\n".join(text.read_text(encoding="utf-8") for text in texts), "utf-8")
    (run,) = PROJECTS["ipu"]["tool"]["drivetrain"]["kit"]
    env |= {key: value.replace("{home}", str(home)) for key, value in run["env"].items()}
    session.chdir(folder)
    session.run(
        "python", "-m", "pytest", "--pyargs", "drivetrain_conformance.suite",
        "--drivetrain-backend=ipu", f"--drivetrain-xfails={known}", *session.posargs, env=env,
    )  # fmt: skip


@nox.session(venv_backend="none", default=False)
def hpu_mutants(session: nox.Session) -> None:
    """Break each rule of the fake Gaudi software, and see a test fail: ``-- NAME`` for one."""
    runner = f"{FOLDER}/hpu/tests/run_fake_mutants.py"
    session.run(shared_python(session), runner, *session.posargs, external=True)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Run the code blocks of every page, and check the links between pages."""
    python = shared_python(session)
    session.run(python, "ci/links.py", external=True)
    pages = ["README.md", "docs", *(f"{FOLDER / name}/README.md" for name in TOGETHER)]
    elsewhere = [f"--ignore={page}" for name in APART for page in pages_of(name)]
    session.run(
        python, "-m", "pytest", "-p", "pages", *pages, *elsewhere, *session.posargs,
        env={"PYTHONPATH": "ci"}, external=True,
    )  # fmt: skip


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """Prepare a release: ``nox -s release -- cpu [--dry-run]``."""
    session.install("-q", *CONSTRAINTS, "packaging", "towncrier")
    session.run("python", "ci/release.py", *session.posargs)


@nox.session(default=False)
def benchmarks(session: nox.Session) -> None:
    """Measure beside other frameworks: ``nox -s benchmarks -- step_overhead [options]``."""
    peers = ("lightning", "accelerate", "pytorch-ignite")
    session.install(
        "-q", *CONSTRAINTS, *peers, *editable(["interfaces", "toolkit", "cpu", "trainer"])
    )
    name, *options = session.posargs or ["step_overhead"]
    session.run("python", f"benchmarks/{name}.py", *options)


@nox.session(venv_backend="none", default=False)
def kills(session: nox.Session) -> None:
    """Kill -9 a run at 200 points and resume it each time: ``nox -s kills -- --kills 1000``."""
    script = "tests-integration/scripts/kills.py"
    options = session.posargs or ["--kills", "200"]
    session.run(shared_python(session), script, *options, external=True)


@nox.session(venv_backend="none", default=False)
def signals(session: nox.Session) -> None:
    """Stop runs on two ranks at random moments and resume them: ``nox -s signals -- 100``."""
    folder = session.create_tmp()
    shutil.rmtree(Path(folder) / "runs", ignore_errors=True)
    runs = session.posargs[0] if session.posargs else "100"
    session.run(
        shared_python(session), "tests-integration/scripts/stop_anywhere.py",
        str(Path(folder).resolve() / "runs"), runs, "fork", "fork", "script",
        env={"OMP_NUM_THREADS": "1"}, external=True,
    )  # fmt: skip


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Fuzz the readers of checkpoints, guided by coverage: ``nox -s fuzz -- SECONDS``."""
    session.install("-q", *CONSTRAINTS, "atheris", *editable(["interfaces", "toolkit"]))
    session.run("python", "ci/fuzz_checkpoints.py", *session.posargs)


@nox.session(default=False)
def lightning(session: nox.Session) -> None:
    """Import checkpoints that Lightning has just written, and go on from them."""
    local = editable(["interfaces", "toolkit", "cpu", "trainer"])
    session.install("-q", *CONSTRAINTS, *TEST_TOOLS, "lightning", *local)
    session.run("pytest", "tests-integration/test_lightning_import.py", *session.posargs)


@nox.session(venv_backend="none", default=False)
def any_to_any(session: nox.Session) -> None:
    """Save with each strategy and number of ranks, load with each: ``-- ddp@2:fsdp@4 …``.

    Without pairs, all, of which docs/any-to-any.md is written.
    """
    folder = Path(session.create_tmp()).resolve() / "saved"
    shutil.rmtree(folder, ignore_errors=True)
    script = "tests-integration/scripts/any_to_any.py"
    options = session.posargs or ["--table", "docs/any-to-any.md"]
    session.run(shared_python(session), script, str(folder), *options, external=True)


@nox.session(venv_backend="none", default=False)
def network(session: nox.Session) -> None:
    """Torchrun on two network namespaces: lose a worker, a host, the link. Needs root, iproute2."""
    session.run(
        shared_python(session), "-m", "pytest", "-rs", "-s", "tests-integration/network_faults.py",
        *session.posargs, external=True,
    )  # fmt: skip


@nox.session(venv_backend="none", default=False)
def strategies(session: nox.Session) -> None:
    """Try all combinations with each strategy, and run the kit: ``nox -s strategies -- fsdp``.

    The kit runs on CPU processes and on simulated devices. Reports are left in ``build/reports``.
    """
    python, home = shared_python(session), ROOT / "tests-integration"
    names = session.posargs or ("ddp2", "dp", "fsdp", "pipeline", "rpc", "tp", "zero1", "zero2")
    script = str(home / "scripts/strategy_matrix.py")
    path = os.pathsep.join([str(home / "scripts"), str(ROOT / FOLDER / "conformance/tests")])
    session.run(python, script, *session.posargs, env={"PYTHONPATH": path}, external=True)
    session.run(python, "ci/strategy_table.py", external=True)
    env = {"PYTHONPATH": path, "DRIVETRAIN_SIMULATED": '{"devices": 4}'}
    session.chdir(session.create_tmp())
    for name in names:
        target = {"tp": "kit_strategies:TP", "pipeline": "kit_strategies:PIPELINE"}.get(name, name)
        known = home / f"conformance/{name}.toml"
        for place, backend in (("cpu", "cpu"), ("simulated", "simulated_backend:spec")):
            session.run(
                python, "-m", "pytest", "--pyargs", "drivetrain_conformance.suite",
                f"--drivetrain-backend={backend}", f"--drivetrain-strategy={target}",
                f"--drivetrain-report={ROOT / REPORTS / f'{place}-{name}.json'}",
                *([f"--drivetrain-xfails={known}"] if known.exists() else []),
                env=env, external=True,
            )  # fmt: skip
