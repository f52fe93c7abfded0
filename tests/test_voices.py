"""Under a launcher: who says what. The processes of a run have one parent, as here the two calls have."""

import os
import tempfile
from pathlib import Path

import pytest

from dpt_t2i import cli


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_first_to_fail_speaks_whichever_it_is(
    launched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["probe", "--nope"]) == 2
    assert capsys.readouterr().err.startswith("\nerror: unknown option `--nope`"), "not behind a progress bar"
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["probe", "--nope"]) == 2
    assert capsys.readouterr().err == ""


def test_the_next_run_has_a_voice_of_its_own(
    launched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["probe", "--nope"])
    monkeypatch.setattr("os.getppid", os.getpid)  # another launcher: any process that runs, but not our parent
    cli.main(["probe", "--nope"])
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_restart_under_the_same_launcher_has_a_voice_of_its_own(
    launched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`torchrun --max_restarts`: new processes, the same parent."""
    for attempt in ("0", "0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        cli.main(["probe", "--nope"])
    assert capsys.readouterr().err.count("error: ") == 2


def test_alone_every_failure_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        cli.main(["probe", "--nope"])
    assert capsys.readouterr().err.count("error: ") == 2
