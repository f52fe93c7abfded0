"""Checkpoints are whole or not there, rotate, are found by name, and give AdamW its moments back."""

import errno
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dpt_t2i.errors import InputError
from dpt_t2i.training import checkpoint
from dpt_t2i.training.checkpoint import checkpoints, drop, find_checkpoint, later, read_optimizer, write_checkpoint

Parameters = dict[str, nn.Parameter]


def trained(*shape: int, steps: int = 2) -> tuple[Parameters, torch.optim.AdamW]:
    """`used` takes gradient n at step n, `idle` never one."""
    parameters = {"used": nn.Parameter(torch.zeros(shape or (2,))), "idle": nn.Parameter(torch.zeros(1))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for step in range(1, steps + 1):
        parameters["used"].grad = torch.full_like(parameters["used"], float(step))
        optimizer.step()
    return parameters, optimizer


def write(run: Path, step: int, keep: int = 10, text: str = "weights") -> Path:
    parameters, optimizer = trained()
    return write_checkpoint(
        run, step, parameters, optimizer, lambda folder: (folder / "art").write_text(text), {"scale": 8.0}, keep
    )


def contents(run: Path) -> dict[str, bytes]:
    """Every file below, hidden folders included."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_a_checkpoint_holds_artifacts_moments_and_state(tmp_path):
    folder = write(tmp_path / "run", 7)
    assert folder == tmp_path / "run" / "checkpoint-7"
    assert sorted(path.name for path in folder.iterdir()) == ["art", "optimizer.safetensors", "state.json"]
    sizes = {name: (folder / name).stat().st_size for name in ("art", "optimizer.safetensors")}
    assert json.loads((folder / "state.json").read_text()) == {"step": 7, "scale": 8.0, "files": sizes}
    moments = load_file(folder / "optimizer.safetensors")
    assert moments.keys() == {"used|step", "used|exp_avg", "used|exp_avg_sq"}
    # Gradients 1 and 2 with betas 0.9, 0.999: 0.9 * 0.1 * 1 + 0.1 * 2, and 0.999 * 0.001 * 1 + 0.001 * 4.
    assert moments["used|exp_avg"].tolist() == pytest.approx([0.29, 0.29])
    assert moments["used|exp_avg_sq"].tolist() == pytest.approx([0.004999, 0.004999])
    assert moments["used|step"].item() == 2


def test_nothing_has_the_final_name_before_all_is_written(tmp_path):
    seen: list[Path] = []

    def save(folder: Path) -> None:
        seen.append(folder)
        assert folder.is_dir() and not (tmp_path / "checkpoint-3").exists()
        assert checkpoints(tmp_path) == []

    parameters, optimizer = trained()
    write_checkpoint(tmp_path, 3, parameters, optimizer, save, {}, 2)
    assert seen == [tmp_path / ".checkpoint-3.partial"]
    assert not seen[0].exists()


@pytest.mark.parametrize("broken", ["artifacts", "moments", "state", "rename"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, broken):
    write(tmp_path, 1)
    write(tmp_path, 2, text="older")
    before = contents(tmp_path)
    full = OSError(28, "No space left on device")

    def fail(*args: object, **kwargs: object) -> None:
        raise full

    def save(folder: Path) -> None:
        (folder / "art").write_text("half")
        if broken == "artifacts":
            raise full

    parameters, optimizer = trained()
    if broken == "moments":
        monkeypatch.setattr(checkpoint, "save_file", fail)
    elif broken == "state":
        monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: fail() if self.name == "state.json" else 0)
    elif broken == "rename":
        monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(
        InputError, match=r"cannot write .*checkpoint-3: .*No space left on device.*checkpoint-2 is intact"
    ):
        write_checkpoint(tmp_path, 3, parameters, optimizer, save, {}, 1)
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}, "no partial folder"


def test_leftovers_of_a_kill_do_not_get_into_the_next_try(tmp_path):
    leftover = tmp_path / ".checkpoint-4.partial"
    leftover.mkdir()
    (leftover / "stale").write_text("from a killed run")
    folder = write(tmp_path, 4)
    assert not (folder / "stale").exists() and not leftover.exists()


def test_the_same_step_again_replaces_the_folder(tmp_path):
    write(tmp_path, 5, text="first")
    folder = write(tmp_path, 5, text="second")
    assert (folder / "art").read_text() == "second"
    assert [step for step, _ in checkpoints(tmp_path)] == [5]


def test_rotation_keeps_the_newest_by_number(tmp_path):
    for step in (8, 9, 10, 100):  # as text 10 and 100 come before 8
        write(tmp_path, step, keep=2)
    assert [(step, path.name) for step, path in checkpoints(tmp_path)] == [
        (10, "checkpoint-10"),
        (100, "checkpoint-100"),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-100"}


def test_a_folder_without_state_is_never_found_nor_counted(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "optimizer.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint-2-copy").mkdir()
    (tmp_path / "checkpoint-2-copy" / "state.json").write_text("{}")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    with pytest.raises(InputError, match=r"checkpoint-9 is no checkpoint: .*state\.json is missing"):
        find_checkpoint(tmp_path, "checkpoint-9")
    write(tmp_path, 3, keep=2)  # the broken one takes no place
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 3]


@pytest.mark.parametrize("damage", ["cut", "gone", "empty state"])
def test_latest_is_the_newest_whole_one(tmp_path, caplog, damage):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    if damage == "cut":
        (newest / "art").write_text("weig")
    elif damage == "gone":
        (newest / "art").unlink()
    else:
        (newest / "state.json").write_text("")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    assert "checkpoint-2 is not whole and is passed over" in caplog.text
    with pytest.raises(InputError, match="checkpoint-2 is damaged: a file is missing or cut short"):
        find_checkpoint(tmp_path, "checkpoint-2")
    assert (write(tmp_path, 2) / "art").read_text() == "weights", "and is replaced when its step comes again"


def test_a_kill_during_a_removal_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)
    real = checkpoint.shutil.rmtree

    def killed(folder: Path, **kwargs: object) -> None:
        if folder.name == ".checkpoint-1.old" and folder.exists():
            (folder / "art").unlink()
            raise KeyboardInterrupt
        real(folder, **kwargs)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 3, keep=2)
    monkeypatch.undo()
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3]
    assert not (tmp_path / "checkpoint-1").exists()
    write(tmp_path, 4)
    assert not list(tmp_path.glob(".checkpoint-*")), "leftovers are cleared"


def test_rotation_leaves_the_best_alone(tmp_path):
    parameters, optimizer = trained()
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step, parameters, optimizer, lambda _: None, {}, 2, spared=(1,))
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 3, 4]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk):
    write(small_disk, 1)
    before = contents(small_disk)
    parameters, optimizer = trained(100_000)  # two moments of 400 kB
    with pytest.raises(InputError, match=r"cannot write .*checkpoint-2: .*[Nn]o space left.*checkpoint-1 is intact"):
        write_checkpoint(small_disk, 2, parameters, optimizer, lambda _: None, {}, 1)
    assert contents(small_disk) == before


def test_counts_of_the_8_bit_optimizer_come_back_as_numbers(tmp_path):
    class Adam8bit(torch.optim.Optimizer):
        pass

    parameter = nn.Parameter(torch.zeros(3))
    state = {"step": 5, "state1": torch.tensor([1, 2, 3], dtype=torch.uint8), "absmax1": torch.tensor([0.5])}
    optimizer, fresh = (Adam8bit([parameter], {"lr": 0.1}) for _ in range(2))
    optimizer.state[parameter] = dict(state)
    folder = write_checkpoint(tmp_path, 5, {"p": parameter}, optimizer, lambda _: None, {}, 1)
    read_optimizer(folder, {"p": parameter}, fresh)
    got = fresh.state[parameter]
    assert got["step"] == 5 and isinstance(got["step"], int)
    assert got["state1"].dtype == torch.uint8 and got["state1"].tolist() == [1, 2, 3] and got["absmax1"].item() == 0.5


def test_what_lies_after_the_step_gone_on_from_is_dropped(tmp_path):
    for step in (2, 9, 10, 11):
        write(tmp_path, step)
    drop(later(tmp_path, 9))
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 9]


def test_find_checkpoint(tmp_path, caplog):
    run = tmp_path / "run"
    assert find_checkpoint(run, None) is None
    assert find_checkpoint(run, "latest") is None, "a scheduler gives the first start the restart's command"
    assert f"{run} holds no checkpoint yet" in caplog.text
    (run / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(InputError, match="`latest`, but .* holds no whole checkpoint"):
        find_checkpoint(run, "latest")
    for step in (2, 10):
        write(run, step)
    assert find_checkpoint(run, None) is None, "a run resumes only where it is asked to"
    assert find_checkpoint(run, "latest") == run / "checkpoint-10"
    assert find_checkpoint(run, "checkpoint-2") == run / "checkpoint-2"
    assert find_checkpoint(tmp_path / "other", str(run / "checkpoint-2")) == run / "checkpoint-2"
    write(tmp_path / "other", 7)
    with pytest.raises(InputError, match="checkpoint-2 is of another run, and .*other holds checkpoints of its own"):
        find_checkpoint(tmp_path / "other", str(run / "checkpoint-2"))
    missing = "resume_from_checkpoint checkpoint-3 is no checkpoint.*there are: checkpoint-2, checkpoint-10 "
    with pytest.raises(InputError, match=missing):
        find_checkpoint(run, "checkpoint-3")


def test_the_optimizer_goes_on_as_if_never_stopped(tmp_path):
    straight, optimizer = trained(2, 3, steps=2)
    folder = write_checkpoint(tmp_path, 2, straight, optimizer, lambda _: None, {}, 2)
    resumed = {name: nn.Parameter(value.detach().clone()) for name, value in straight.items()}
    fresh = torch.optim.AdamW(resumed.values(), lr=0.1)
    assert read_optimizer(folder, resumed, fresh)["step"] == 2
    want, got = optimizer.state[straight["used"]], fresh.state[resumed["used"]]
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], value) for key, value in want.items())
    assert resumed["idle"] not in fresh.state, "what had no gradient has no moments"
    for parameters, adamw in ((straight, optimizer), (resumed, fresh)):
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, -3.0)
        adamw.step()
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_file_is_refused(tmp_path, name, damage):
    folder = write(tmp_path, 1)
    file = folder / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])
    parameters, optimizer = trained()
    with pytest.raises(InputError, match=r"checkpoint-1 is damaged: .*; resume from an earlier one"):
        read_optimizer(folder, parameters, optimizer)


def test_half_of_a_parameters_moments_is_refused(tmp_path):
    folder = write(tmp_path, 1)
    moments = load_file(folder / "optimizer.safetensors")
    del moments["used|exp_avg_sq"]
    save_file(moments, folder / "optimizer.safetensors")
    parameters, optimizer = trained()
    with pytest.raises(InputError, match="incomplete for `used`"):
        read_optimizer(folder, parameters, optimizer)


def test_moments_of_another_model_are_refused(tmp_path):
    folder = write(tmp_path, 1)
    parameters, optimizer = trained(4)
    with pytest.raises(InputError, match=r"of another model: `used` is \(2,\) there"):
        read_optimizer(folder, parameters, optimizer)


def test_an_old_checkpoint_that_a_network_disk_holds_on_to_ends_no_run(tmp_path, monkeypatch):
    real = checkpoint.shutil.rmtree

    def held(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        real(path, ignore_errors=True)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", held)
    for step in (1, 2, 3):
        write(tmp_path, step, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3]
