"""What a command accepts it reads: no flag is parsed and then forgotten. The stages have `training/test_wiring.py`."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dpt_t2i import config as settings
from dpt_t2i.config import Section, build_config, leaves
from dpt_t2i.scenes.commands import export_scenes
from tests.tiny import tiny_adapter, tiny_backbone, tiny_pipeline

ITM, REC = "dpt_t2i.evaluation.commands:run_itm", "dpt_t2i.evaluation.commands:run_rec"
COMMANDS: dict[str, tuple[type[Section], dict[str, Any]]] = {  # `module:function` -> its config, what it needs
    "dpt_t2i.evaluation.commands:run_score": (settings.ScoreConfig, {"score_draws": 1}),
    ITM: (settings.DiscriminationConfig, {"dataset": "{data}", "val_samples": 4}),
    REC: (settings.DiscriminationConfig, {"dataset": "{data}", "val_samples": 4}),
    "dpt_t2i.training.cached:run_cache": (
        settings.CacheConfig,
        {"dataset": "{data}", "cache_dir": "{out}", "val_samples": 4},
    ),
    "dpt_t2i.publish.export:run_export": (settings.ExportConfig, {"lora": None, "format": "kohya"}),
    "dpt_t2i.data.commands:run_perturb": (settings.PerturbConfig, {"dataset": "{data}"}),
    "dpt_t2i.training.mining:run_mine": (settings.MineConfig, {"dataset": "{data}"}),
    "dpt_t2i.data.inspection:run_inspect": (settings.InspectConfig, {"dataset": "{data}"}),
    "dpt_t2i.doctor:run_doctor": (settings.DoctorConfig, {}),
}
ELSEWHERE = {  # read with other data or another value alone, and refused or of no consequence here
    "data.data_seed": "of drawn scenes, and of the order of training",
    "data.shuffle_buffer": "of streams, and refused without one",
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A data set, and a base with an adapter."""
    from dpt_t2i.adapter.io import save_adapter
    from dpt_t2i.backbones.lora import add_lora, save_lora

    folder = tmp_path_factory.mktemp("given")
    export_scenes(folder / "data", n=8, size=32)
    tiny_pipeline().save_pretrained(folder / "base")
    backbone = tiny_backbone()
    tuned = folder / "base" / "dpt" / "tuned"
    save_adapter(tiny_adapter(backbone), tuned / "adapter", base_fingerprint=backbone.fingerprint(), metadata={})
    add_lora(backbone, 2)
    save_lora(backbone, tuned, {})
    return {"data": str(folder / "data"), "base": str(folder / "base")}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """(section, field) of every setting that is looked at."""
    found: set[tuple[str, str]] = set()
    plain = Section.__getattribute__

    def spy(self: Section, name: str) -> Any:
        if name in type(self).model_fields:
            found.add((type(self).__name__, name))
        return plain(self, name)

    monkeypatch.setattr(Section, "__getattribute__", spy)
    yield found


@pytest.mark.parametrize("run", COMMANDS)
def test_every_setting_of_a_command_is_read(
    given: dict[str, str], read: set[tuple[str, str]], tmp_path: Path, run: str
) -> None:
    kind, needed = COMMANDS[run]
    known = {path.rpartition(".")[2] for path, _ in leaves(kind)}
    common = {"pretrained_model_name_or_path": given["base"], "device": "cpu", "output_dir": "{out}"}
    places = given | {"out": str(tmp_path / "out")}
    asked = {key: value for key, value in (common | needed).items() if key in known}
    config = build_config(
        kind, None, {key: value.format(**places) if isinstance(value, str) else value for key, value in asked.items()}
    )
    module, _, function = run.partition(":")
    picture = (Path(given["data"]) / "000000.png", "a red circle") if function == "run_score" else ()
    read.clear()
    getattr(import_module(module), function)(config, *picture)
    looked_at = set(read)
    unread = []
    for path, _ in leaves(kind):
        *sections, leaf = path.split(".")
        section: Any = config
        for name in sections:
            section = getattr(section, name)
        if (type(section).__name__, leaf) not in looked_at and path not in ELSEWHERE:
            unread.append(path)
    assert unread == []
