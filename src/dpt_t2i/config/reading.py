"""From YAML, overrides and flags to a config: unknown keys are refused, and the leaf's own type reads the text."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dpt_t2i.config.sections import Section
from dpt_t2i.errors import InputError
from dpt_t2i.files import write_text

ALIASES = {  # other names that users know -> leaf; of the release's flags those that mean just the same
    "unet_feature": "tap",
    "qformer_ckpt": "adapter",
    "lora_rank": "rank",
    "nheads": "num_heads",
    "contrastive_loss_hdim": "contrastive_dim",
    "text_encoder_type": "grounding_text",
    "ce_loss_coef": "ce_coef",
    "bbox_loss_coef": "bbox_coef",
    "giou_loss_coef": "giou_coef",
    "contrastive_align_loss_coef": "align_coef",
    "temperature_NCE": "align_temperature",
    "train_data_dir": "dataset",
    "dataset_name": "dataset",
    "max_train_samples": "max_samples",
    "img_root": "image_root",
    "correction_factor": "correct",
    "num_inference_steps": "steps",
    "num_timesteps": "steps",
    "gpuid": "device",
    "gpu": "device",
    "outdir": "output_dir",
    "base": "pretrained_model_name_or_path",
    "out": "output_dir",
}


ConfigT = TypeVar("ConfigT", bound=Section)


class UnknownKey(InputError):
    """A config has no key of that name."""


def leaves(config: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted path and field of every leaf of a config class, in order."""
    for name, info in config.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from leaves(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def resolve_key(config: type[Section], key: str) -> str:
    """Dotted path of `key`, which may be a bare leaf name; hyphen = underscore.

    Raises:
        InputError: the key is unknown; names the nearest one.
    """
    section, dot, name = key.replace("-", "_").rpartition(".")
    wanted = f"{section}{dot}{ALIASES.get(name, name)}"
    paths = [path for path, _ in leaves(config)]
    if wanted in paths:
        return wanted
    by_leaf = {path.rsplit(".", 1)[-1]: path for path in paths}
    if wanted in by_leaf:
        return by_leaf[wanted]
    near = difflib.get_close_matches(wanted, [*paths, *by_leaf], n=1)
    hint = f"; did you mean `{near[0]}`?" if near else f"; known keys: {', '.join(sorted(by_leaf))}"
    raise UnknownKey(f"unknown config key `{key}`{hint}")


def build_config(
    config: type[ConfigT], file: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> ConfigT:
    """Defaults, then the YAML `file`, then `overrides` (leaf or dotted name -> value or its text).

    Raises:
        InputError: file missing or not YAML, unknown key, or a value out of range.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values.update(_flatten(_read_yaml(Path(file)), config))
        except UnknownKey as error:
            raise InputError(f"config file {file}: {error}; is it another command's config?") from None
    values.update((resolve_key(config, key), value) for key, value in (overrides or {}).items())
    known = dict(leaves(config))
    given = {path: _read_text(path, value, known[path]) for path, value in values.items()}
    tree = config.defaults(given).model_dump()  # whole sections: a command may have its own defaults for one
    for path, value in given.items():
        _place(tree, path, value)
    try:
        built = config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # keys that are each right and do not go together
            raise InputError(str(first["ctx"]["error"])) from error
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"config key `{where}`: {first['msg']} (got {first['input']!r})") from error
    _tell_given(built, given)
    return built


def _tell_given(config: Section, given: Collection[str], prefix: str = "") -> None:
    """Let `model_fields_set` of each section say what was given, at its default value or another."""
    for name, value in config:
        path = f"{prefix}{name}."
        if isinstance(value, Section):
            _tell_given(value, given, path)
        if not any(f"{key}.".startswith(path) for key in given):
            config.model_fields_set.discard(name)


def save_config(config: Section, path: Path) -> None:
    """Write the resolved settings as YAML, every default included."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _read_yaml(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"config file {path} does not exist")
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise InputError(f"config file {path} must hold `key: value` lines, not a {type(tree).__name__}")
    return tree


class _Loader(yaml.BaseLoader):
    """Of two equal keys YAML's own loader would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key.value}` stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _parse(text: str) -> Any:
    """Text, lists and mappings, nothing else: types are the leaves' business."""
    return yaml.load(text, Loader=_Loader)


def _flatten(tree: Mapping[str, Any], config: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if value == "" and any(leaf.startswith(f"{path}.") for leaf, _ in leaves(config)):
            continue  # a section of which every line is commented out
        if isinstance(value, Mapping):
            yield from _flatten(value, config, f"{path}.")
        else:
            yield resolve_key(config, path), value


def _read_text(path: str, value: Any, info: FieldInfo) -> Any:
    """The three shapes that text alone does not show: nothing, a list, and the word `none` of `lora` and `adapter`."""
    if not isinstance(value, str):
        return value
    if is_optional(info):
        keeps_none = path in ("model.lora", "model.adapter")  # there `none` means: load none, not even the default
        if value.lower() in ("", "null", "~") or (value.lower() == "none" and not keeps_none):
            return None
    if not is_tuple(info):
        if value == "" and info.annotation is Path:
            raise InputError(f"config key `{path}` is empty; give a path, or leave it out")
        return value
    if value in ("", "null", "~"):
        return ()
    try:
        return _parse(value) if value.startswith("[") else (value,)
    except yaml.YAMLError as error:
        raise InputError(f"config key `{path}`: {value} is not a list such as [a, b]") from error


def is_optional(info: FieldInfo) -> bool:
    return type(None) in get_args(info.annotation)


def is_tuple(info: FieldInfo) -> bool:
    return get_origin(info.annotation) is tuple


def _place(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[leaf] = value
