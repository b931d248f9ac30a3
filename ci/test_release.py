"""The version that fragments ask for, and what a release writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import release
from packaging.version import Version

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("current", "kinds", "expected"),
    [
        ("0.1.0.dev0", ["feature"], "0.1.0"),
        ("0.1.1.dev0", ["bugfix", "doc"], "0.1.1"),
        ("0.1.1.dev0", ["feature", "bugfix"], "0.2.0"),
        ("0.1.1.dev0", ["removal"], "0.2.0"),
        ("0.1.1.dev0", ["trivial"], "0.1.1"),
        ("1.4.1.dev0", ["deprecation"], "1.5.0"),
        ("1.4.0.dev0", ["feature"], "1.4.0"),
        ("1.4.1.dev0", ["removal", "doc"], "2.0.0"),
        ("2.0.0.dev0", ["removal"], "2.0.0"),
    ],
)
def test_the_strongest_fragment_decides_the_version(
    current: str, kinds: list[str], expected: str
) -> None:
    assert release.next_version(Version(current), kinds) == Version(expected)


def test_nothing_to_tell_is_nothing_to_release() -> None:
    with pytest.raises(SystemExit, match="no fragment"):
        release.next_version(Version("1.0.1.dev0"), [])


def test_a_release_opens_the_next_version() -> None:
    assert release.opened_after(Version("1.4.0")) == Version("1.4.1.dev0")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a real package's settings, with a fragment."""
    folder = tmp_path / "packages/cpu"
    (folder / "changes").mkdir(parents=True)
    for name in ("pyproject.toml", "CHANGELOG.md"):
        text = (release.ROOT / "packages/cpu" / name).read_text(encoding="utf-8")
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "changes/7.bugfix.md").write_text("Threads are counted.\n", encoding="utf-8")
    (folder / "changes/8.trivial.md").write_text("A typo.\n", encoding="utf-8")
    release.write_version(folder / "pyproject.toml", Version("0.3.2.dev0"))
    monkeypatch.setattr(release, "ROOT", tmp_path)
    return folder


def test_a_dry_run_writes_nothing_and_names_the_tag(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (package / "CHANGELOG.md").read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["release.py", "cpu", "--dry-run"])
    release.main()
    said = capsys.readouterr().out
    assert "0.3.2.dev0 becomes 0.3.2" in said
    assert "git tag drivetrain-cpu-v0.3.2" in said
    assert "Threads are counted. (#7)" in said
    assert "0.3.2.dev0" in (package / "pyproject.toml").read_text(encoding="utf-8")
    assert (package / "CHANGELOG.md").read_text(encoding="utf-8") == before


def test_a_release_writes_the_version_and_the_changelog_and_takes_the_fragments(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["release.py", "cpu"])
    release.main()
    assert 'version = "0.3.2"' in (package / "pyproject.toml").read_text(encoding="utf-8")
    changelog = (package / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## 0.3.2" in changelog
    assert "Threads are counted. (#7)" in changelog
    assert list((package / "changes").glob("*.md")) == []
    monkeypatch.setattr("sys.argv", ["release.py", "cpu", "--open", "0.3.3.dev0"])
    release.main()
    assert 'version = "0.3.3.dev0"' in (package / "pyproject.toml").read_text(encoding="utf-8")


def test_an_unknown_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["release.py", "abacus"])
    with pytest.raises(SystemExit, match="no package 'abacus'"):
        release.main()
