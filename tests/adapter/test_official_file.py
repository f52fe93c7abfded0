"""Reading a released checkpoint: tensors, and nothing but tensors."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dpt_t2i.adapter.official_file import read_official
from dpt_t2i.errors import InputError

STATE = {"b": torch.ones(3), "a": torch.zeros(2, 2)}


def test_the_tensors_come_in_the_files_order(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    for given in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert list(read_official(given)) == ["b", "a"]


def test_the_legacy_format_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_official(tmp_path / "old.bin")["b"], STATE["b"])


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    assert read_official(tmp_path).keys() == STATE.keys()
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:50])
    with pytest.raises(InputError, match="truncated"):
        read_official(tmp_path)


class Hostile:
    """A pickle that makes a folder when it is opened carelessly."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    bad = STATE | {"c": Hostile(tmp_path / "pwned")}
    torch.save(bad, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="refused.*code; nothing of it was run"):
        read_official(tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(pickle.dumps(Hostile(tmp_path / "pwned")))
    with pytest.raises(InputError, match="refused"):
        read_official(tmp_path / "y.bin")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 700, -1])
def test_a_truncated_file_is_one_line(tmp_path: Path, kept: int) -> None:
    torch.save(STATE, tmp_path / "whole.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:kept])
    with pytest.raises(InputError, match="cut.bin is truncated") as caught:
        read_official(tmp_path / "cut.bin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({}, "not a table"),
        ({"state_dict": {"a": torch.zeros(1)}}, "`state_dict` is a dict"),
        ({3: torch.zeros(1)}, "`3` is a Tensor"),
        ({"a": torch.tensor([1.0, float("nan")])}, "`a` holds NaN"),
        ({"a": torch.zeros(1).expand(10**13)}, "`a` is no plain table"),  # 40 terabytes out of four bytes
        ({"a": torch.eye(2).to_sparse()}, "`a` is no plain table"),
        ({"a": torch.zeros(2, device="meta")}, "`a` is no plain table"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "`a` is no plain table"),
    ],
)
def test_anything_but_a_table_of_tensors_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(InputError, match=message):
        read_official(tmp_path / "x.bin")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no pytorch_model.bin"):
        read_official(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read_official(tmp_path / "none.bin")
