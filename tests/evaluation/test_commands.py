"""The commands: files, JSON, lines for people, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpt_t2i.config import AlignmentConfig, DataConfig, DiscriminationConfig, ScoreConfig, SearchConfig
from dpt_t2i.data.records import Expression, Record
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation import commands
from dpt_t2i.sampling.model import T2IModel


@pytest.fixture
def loaded(model: T2IModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replaces `load_model`; keeps what it was called with."""
    calls: list[tuple[Any, ...]] = []

    def load(*given: Any) -> T2IModel:
        calls.append(given)
        return model if given[2] != "none" else T2IModel(model.backbone)

    monkeypatch.setattr(commands, "load_model", load)
    return calls


def discrimination(folder: Path, **settings: Any) -> DiscriminationConfig:
    data = DataConfig(resolution=32, val_samples=5)
    return DiscriminationConfig(output_dir=folder, data=data, **settings)


def test_score(loaded: list[tuple[Any, ...]], tmp_path: Path) -> None:
    picture = tmp_path / "my.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    result = commands.run_score(ScoreConfig(output_dir=tmp_path / "out", score_draws=1), picture, "a red circle")
    assert -1 <= result["score"] <= 1 and [p["phrase"] for p in result["phrases"]] == ["red circle"]
    with Image.open(result["annotated"]) as annotated:
        assert annotated.size == (512, 512)
    assert Path(result["annotated"]) == tmp_path / "out" / "my_annotated.png"
    saved = json.loads((tmp_path / "out" / "score.json").read_text())
    assert saved == json.loads(json.dumps({k: v for k, v in result.items() if k not in ("summary", "annotated")}))
    assert f"{result['score']:+.3f}" in result["summary"][0] and "red circle: box (" in result["summary"][1]


@pytest.mark.parametrize("name, content", [("missing.png", None), ("broken.png", b"\x89PNG\r\n\x1a\nnothing")])
def test_an_unreadable_image_is_named(
    loaded: list[tuple[Any, ...]], tmp_path: Path, name: str, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"cannot read image .*{name}"):
        commands.run_score(ScoreConfig(output_dir=tmp_path), tmp_path / name, "a star")
    assert not loaded  # before a model is loaded


def test_itm(loaded: list[tuple[Any, ...]], tmp_path: Path) -> None:
    result = commands.run_itm(discrimination(tmp_path, timesteps=(500, 100)))
    assert result["examples"] == 5 and list(result["timesteps"]) == ["500", "100"]
    assert len((tmp_path / "itm_scores.jsonl").read_text().splitlines()) == 10
    assert json.loads((tmp_path / "itm.json").read_text())["timesteps"] == result["timesteps"]
    share = 100 * result["timesteps"]["500"]["text"]["accuracy"]
    assert result["summary"][0].startswith(f"timestep 500: text {share:.1f} %")
    assert result["versions"]["torch"] and result["settings"]["data"]["val_samples"] == 5


def test_rec(loaded: list[tuple[Any, ...]], tmp_path: Path) -> None:
    result = commands.run_rec(discrimination(tmp_path, timesteps=(500,)))
    assert set(result["timesteps"]["500"]) == {f"{p}precision@{k}" for p in ("", "giou_") for k in (1, 5, 10)}
    assert set(result["oracle"]["500"]) == {"precision@1", "giou_precision@1"}
    assert len((tmp_path / "rec_ranks.jsonl").read_text().splitlines()) == 5
    assert len(result["summary"]) == 2 and result["summary"][1].startswith("oracle, timestep 500: precision@1")


def test_what_the_discriminative_evaluations_refuse(
    loaded: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="timestep 1000 is not in 0..999"):
        commands.run_itm(discrimination(tmp_path, timesteps=(500, 1000)))
    bare = discrimination(tmp_path)
    bare = bare.model_copy(update={"model": bare.model.model_copy(update={"adapter": "none"})})
    with pytest.raises(InputError, match="needs an adapter"):
        commands.run_rec(bare)
    plain = Record("1", "mine", lambda: Image.new("RGB", (32, 32)), ("hello there",))
    monkeypatch.setattr(commands, "open_records", lambda *_: [plain])
    with pytest.raises(InputError, match="no hard negatives"):
        commands.run_itm(discrimination(tmp_path))
    with pytest.raises(InputError, match="no expressions"):
        commands.run_rec(discrimination(tmp_path))


def test_alignment_opens_models_by_path_and_tells_its_numbers(
    monkeypatch: pytest.MonkeyPatch, loaded: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    result = {
        "suite": "dev",
        "prompts": 2,
        "seeds": [0, 1],
        "categories": {"colors": 2},
        "arms": {"base": {"overall": 0.25, "colors": 0.25, "extra_objects": 0.5}},
        "differences": {"dpt-base": {"mean": 0.125, "low": -0.05, "high": 0.3}},
    }

    def run_arms(config: AlignmentConfig, open_model: Any) -> dict[str, Any]:
        open_model(tmp_path / "lora", None)
        open_model(None, tmp_path / "adapter")
        return result

    monkeypatch.setattr(commands, "run_arms", run_arms)
    summary = commands.run_alignment(AlignmentConfig(output_dir=tmp_path))["summary"]
    assert [call[1:3] for call in loaded] == [(str(tmp_path / "lora"), "none"), ("none", str(tmp_path / "adapter"))]
    assert summary == [
        "dev: 2 prompts, seeds 0, 1; right images, %",
        "base   25.0  (colors 25.0)",
        "dpt-base: +12.5 points, 95 % [-5.0, +30.0]",
    ]


def test_one_prompt_of_a_category_is_told_to_have_no_spread(
    monkeypatch: pytest.MonkeyPatch, loaded: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    result = {"suite": "dev", "prompts": 3, "seeds": [0], "categories": {"colors": 1, "counting": 2}}
    arms = {"base": {"overall": 0.5, "colors": 0.5, "counting": 0.5}}
    monkeypatch.setattr(commands, "run_arms", lambda *_: result | {"arms": arms, "differences": {}})
    summary = commands.run_alignment(AlignmentConfig(output_dir=tmp_path))["summary"]
    told = "warning: one prompt tells no spread, so intervals are too narrow: colors"
    assert summary[-1] == told
    assert commands.run_alignment(AlignmentConfig(output_dir=tmp_path))["warnings"] == [told]


def test_other_processes_have_nothing_to_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(commands, "run_arms", lambda config, open_model: {})
    assert commands.run_alignment(AlignmentConfig(output_dir=tmp_path)) == {"arms": {}, "summary": []}


def test_every_expression_of_a_record_counts_where_that_is_asked(
    loaded: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    things = [Expression(f"the {word} dot", (((0, 5)),), ((4.0 * n, 4.0, 9.0, 9.0),)) for n, word in enumerate("abc")]
    blank = Expression("the air", (), ())
    record = Record("1", "mine", lambda: Image.new("RGB", (32, 32), "red"), ("a",), (things[0], blank, *things[1:]))
    monkeypatch.setattr(commands, "open_records", lambda *_: [record])
    assert commands.run_rec(discrimination(tmp_path, timesteps=(500,)))["examples"] == 1
    result = commands.run_rec(discrimination(tmp_path, timesteps=(500,), all_expressions=True))
    assert result["examples"] == 3
    rows = [json.loads(line) for line in (tmp_path / "rec_ranks.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["mine/1#0", "mine/1#2", "mine/1#3"]
    with pytest.raises(InputError, match="all_expressions is for `dpt evaluate rec`"):
        commands.run_itm(discrimination(tmp_path, all_expressions=True))


def test_a_model_that_never_drew_the_world_is_told_so(
    monkeypatch: pytest.MonkeyPatch, loaded: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    none = {"overall": 0.0, "colors": 0.0, "extra_objects": 0.0}
    result = {"suite": "dev", "prompts": 2, "seeds": [0], "categories": {"colors": 2}, "differences": {}}
    monkeypatch.setattr(commands, "run_arms", lambda *_: result | {"arms": {"base": none, "dpt": none}})
    last = commands.run_alignment(AlignmentConfig(output_dir=tmp_path))["summary"][-1]
    assert last.startswith("warning: no arm drew a single right image")


@pytest.mark.parametrize("run", [commands.run_itm, commands.run_rec])
@pytest.mark.parametrize(
    "setting, said",
    [
        ({"max_samples": 3}, "--val_samples says how many"),
        ({"scene_categories": ("counting",)}, "scene_categories is for training"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers is for training"),
    ],
)
def test_what_only_training_reads_is_refused(
    loaded: list[tuple[Any, ...]], tmp_path: Path, run: Any, setting: dict[str, Any], said: str
) -> None:
    config = discrimination(tmp_path)
    with pytest.raises(InputError, match=said):
        run(config.model_copy(update={"data": config.data.model_copy(update=setting)}))


def test_a_result_of_other_settings_is_kept(loaded: list[tuple[Any, ...]], tmp_path: Path) -> None:
    for timestep in (500, 100):
        commands.run_itm(discrimination(tmp_path, timesteps=(timestep,)))
    kept, new = (json.loads((tmp_path / name).read_text())["timesteps"] for name in ("itm.1.json", "itm.json"))
    assert (list(kept), list(new)) == (["500"], ["100"])
    assert (tmp_path / "itm_scores.1.jsonl").is_file()


def test_a_timestep_that_is_given_twice_counts_once(loaded: list[tuple[Any, ...]], tmp_path: Path) -> None:
    result = commands.run_itm(discrimination(tmp_path, timesteps=(100, 100)))
    assert result["timesteps"]["100"]["text"]["count"] == result["examples"]


def test_a_noise_level_that_does_not_exist_ends_an_evaluation_before_its_first_arm(
    loaded: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    search = SearchConfig(score_timestep=1000)
    config = AlignmentConfig(output_dir=tmp_path, arms=("base", "dpt"), suite="dev", max_prompts=1, search=search)
    with pytest.raises(InputError, match="score_timestep 1000 is not in 0..999"):
        commands.run_alignment(config)
    assert len(loaded) == 1 and not (tmp_path / "arms").exists()
