"""Reading a checkpoint of the authors' release: the one place where a pickle is opened, and only for its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dpt_t2i.errors import InputError

NAMES = ("pytorch_model.bin", "model.safetensors")  # what accelerate's `save_state` writes, then and now

CODE = re.compile(
    r"Unsupported (global|class|operand 1(47|49)\b)|not an allowed global|Trying to (call|instantiate)", re.IGNORECASE
)


def read_official(path: Path) -> dict[str, Tensor]:
    """The tensors of a released checkpoint by name, in the file's order, on the CPU.

    Args:
        path: `pytorch_model.bin` or a safetensors file, or the folder that holds one.

    Raises:
        InputError: nothing there; truncated; anything but a flat table of finite tensors. A pickle that asks for code
            to be run is refused unrun.
    """
    file = _find(Path(path))
    state = _load(file)
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"checkpoint {file} holds a {type(state).__name__}, not a table of tensors by name")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"checkpoint {file}: `{key}` is a {type(value).__name__}, not a tensor")
        if not _is_plain(value):
            raise InputError(f"checkpoint {file}: `{key}` is no plain table of numbers that lie in the file")
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"checkpoint {file}: `{key}` holds NaN or infinite values; take an earlier checkpoint")
    return dict(state)


def _is_plain(tensor: Tensor) -> bool:
    """Dense, on the CPU, of numbers, and no larger than its bytes: a view may claim any size."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return dense and not tensor.is_complex() and tensor.nbytes <= tensor.untyped_storage().nbytes()


def _find(path: Path) -> Path:
    candidates = [path / name for name in NAMES] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        what = f"holds no {' or '.join(NAMES)}" if path.is_dir() else "does not exist"
        raise InputError(f"checkpoint {path} {what}; give the file or the folder that the release wrote")
    return file


def _load(file: Path) -> object:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"checkpoint {file} is truncated or no safetensors file ({error})") from error
    try:
        content: object = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken or hostile pickle raises is up to its bytes
        if CODE.search(str(error)):
            raise InputError(
                f"checkpoint {file} is refused: it holds more than tensors, perhaps code; nothing of it was run"
            ) from error
        raise InputError(f"checkpoint {file} is truncated or no PyTorch checkpoint; fetch it again") from error
    return content
