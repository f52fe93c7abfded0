"""The table of arms, and what each needs."""

from pathlib import Path
from typing import Any

import pytest

from dpt_t2i.adapter.io import save_adapter
from dpt_t2i.config import AlignmentConfig, CorrectionConfig, ModelConfig, SampleConfig, SearchConfig, build_config
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.arms import ARMS, PAIRS, check_weights, choose_arms, recipe_of
from dpt_t2i.sampling.model import T2IModel

NAMES = (
    "base base_correct base_correct_best4 base_correct_random control control_compute dpt dpt_correct dpt_best4 random "
    "dpt_correct_best4 dpt_correct_random judge_correct judge_best4 judge_random dpt_onpolicy live live_correct"
).split()
SEARCHED_CORRECTED = {"base_correct_best4", "dpt_correct_best4", "judge_best4"}
CORRECTED = {"base_correct", "dpt_correct", "judge_correct", "live_correct"} | SEARCHED_CORRECTED
TUNED = "dpt/tuned/pytorch_lora_weights.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that looks like a base with everything shipped."""
    for folder in ("dpt/tuned/adapter", "dpt/probe/adapter", "run/adapter"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / TUNED).touch()
    (tmp_path / "run/pytorch_lora_weights.safetensors").touch()
    return tmp_path


def config(base: Path, **settings: object) -> AlignmentConfig:
    values = {"correction": CorrectionConfig(correct=0.1), **settings}
    return AlignmentConfig(model=ModelConfig(pretrained_model_name_or_path=str(base)), **values)  # type: ignore[arg-type]


def test_the_table() -> None:
    assert list(ARMS) == NAMES
    assert {name for name, arm in ARMS.items() if arm.corrected} == CORRECTED
    blind = {arm.random_of: name for name, arm in ARMS.items() if arm.random_of}
    assert blind == {"dpt_best4": "random"} | {name: name.replace("best4", "random") for name in SEARCHED_CORRECTED}
    searched = {"dpt_best4"} | SEARCHED_CORRECTED | set(blind.values())
    assert {name: arm.best_of for name, arm in ARMS.items() if arm.best_of > 1} == dict.fromkeys(searched, 4)
    assert {name for pair in PAIRS for name in pair} == set(NAMES)


def test_arms_are_chosen_by_name_in_the_order_of_the_table() -> None:
    assert [arm.name for arm in choose_arms(["dpt", "base", "dpt"])] == ["base", "dpt"]
    with pytest.raises(InputError, match="unknown arm `tuned`"):
        choose_arms(["base", "tuned"])
    with pytest.raises(InputError, match="`random` picks from the images of `dpt_best4`"):
        choose_arms(["random", "dpt"])


def test_every_arm_takes_its_own_weights(base: Path) -> None:
    run = base / "run"
    settings = config(
        base, control_lora=run, control_compute_lora=run / "b.safetensors", onpolicy_lora=run, live_lora=run
    )
    found = {name: recipe_of(ARMS[name], settings) for name in NAMES}
    weights = {
        name: (r.lora and r.lora.relative_to(base), r.adapter and r.adapter.relative_to(base))
        for name, r in found.items()
    }
    tuned = (Path(TUNED), Path("dpt/tuned/adapter"))
    assert weights == {
        "base": (None, None),
        "base_correct": (None, Path("dpt/probe/adapter")),
        "base_correct_best4": (None, Path("dpt/probe/adapter")),
        "base_correct_random": (None, Path("dpt/probe/adapter")),
        "control": (Path("run"), None),
        "control_compute": (Path("run/b.safetensors"), None),
        "dpt": tuned,
        "dpt_correct": tuned,
        "dpt_best4": tuned,
        "random": tuned,
        "dpt_correct_best4": tuned,
        "dpt_correct_random": tuned,
        "judge_correct": tuned,
        "judge_best4": tuned,
        "judge_random": tuned,
        "dpt_onpolicy": (Path("run"), Path("run/adapter")),
        "live": (Path("run"), Path("run/adapter")),
        "live_correct": (Path("run"), Path("run/adapter")),
    }
    corrected = {name for name, r in found.items() if r.settings.correction.correct > 0}
    assert corrected == CORRECTED
    plain = {name for name, r in found.items() if not r.settings.sample.lora_draws}
    assert plain == {"judge_correct", "judge_best4", "judge_random"}


def test_who_draws_is_the_arms_affair(base: Path) -> None:
    with pytest.raises(InputError, match="`no_lora_draws` .* judge_correct"):
        recipe_of(ARMS["dpt"], config(base, sample=SampleConfig(lora_draws=False)))
    fused = config(base, correction=CorrectionConfig(correct=0.1, correction_fused=True))
    assert recipe_of(ARMS["dpt_correct"], fused).settings.correction.correction_fused
    with pytest.raises(InputError, match="arm `judge_correct` draws by the plain base"):
        recipe_of(ARMS["judge_correct"], fused)


def test_sampling_is_the_same_for_every_arm(base: Path) -> None:
    with pytest.raises(InputError, match="`best_of` is what arms differ in; .* dpt_best4"):
        recipe_of(ARMS["base"], config(base, search=SearchConfig(best_of=7)))
    settings = config(base, seed=3, search=SearchConfig(score_draws=5), onpolicy_lora=base / "run")
    recipes = [recipe_of(ARMS[name], settings).settings for name in ("base", "dpt", "dpt_best4", "dpt_onpolicy")]
    assert all(r == recipes[0] for r in recipes)
    assert recipes[0].search == SearchConfig(best_of=1, score_draws=5) and recipes[0].seed == 3
    corrected = recipe_of(ARMS["dpt_correct"], settings).settings
    assert corrected.model_copy(update={"correction": CorrectionConfig()}) == recipes[0]


@pytest.mark.parametrize("arm, flag", [("control", "control_lora"), ("dpt_onpolicy", "onpolicy_lora"), ("dpt", "lora")])
def test_what_is_missing_is_asked_for(base: Path, arm: str, flag: str) -> None:
    (base / TUNED).unlink()
    with pytest.raises(InputError, match=f"arm `{arm}` needs a LoRA: give --{flag}"):
        recipe_of(ARMS[arm], config(base))


def test_weights_that_are_not_there_are_found_out_before_anything_is_drawn(base: Path) -> None:
    known = {"arms": ("base", "control"), "control_lora": base / "run"}
    known["correction"] = CorrectionConfig()
    check_weights(config(base, **known))
    with pytest.raises(InputError, match="LoRA .*nowhere does not exist"):
        check_weights(config(base, **known | {"control_lora": base / "nowhere"}))
    with pytest.raises(InputError, match="no adapter in .*probe/adapter"):  # an empty folder
        check_weights(config(base, arms=("base", "base_correct")))


def test_correction_needs_an_adapter(base: Path) -> None:
    (base / "dpt/probe/adapter").rmdir()
    with pytest.raises(InputError, match="arm `base_correct` needs an adapter: give --probe_adapter"):
        recipe_of(ARMS["base_correct"], config(base))


def test_the_strength_that_is_stored_with_the_adapter_is_the_default(base: Path, model: T2IModel) -> None:
    assert model.adapter is not None
    folder = base / "dpt/tuned/adapter"
    none_given = config(base, correction=CorrectionConfig())
    save_adapter(model.adapter, folder, base_fingerprint={})
    with pytest.raises(InputError, match="no correction strength"):
        recipe_of(ARMS["dpt_correct"], none_given)
    stored: dict[str, Any] = {"correct": 0.03, "correction_rule": "relative"}
    save_adapter(model.adapter, folder, base_fingerprint={}, metadata={"correction": stored})
    assert recipe_of(ARMS["dpt_correct"], none_given).settings.correction == CorrectionConfig(**stored)  # type: ignore[arg-type]
    assert recipe_of(ARMS["dpt_correct"], config(base)).settings.correction.correct == 0.1
    whole = build_config(AlignmentConfig, overrides={"pretrained_model_name_or_path": str(base)})  # as commands do
    assert recipe_of(ARMS["dpt_correct"], whole).settings.correction == CorrectionConfig(**stored)  # type: ignore[arg-type]
    sparse = config(base, correction=CorrectionConfig(correction_every=3))
    expected = CorrectionConfig(**stored, correction_every=3)  # type: ignore[arg-type]
    assert recipe_of(ARMS["dpt_correct"], sparse).settings.correction == expected
    path = {"pretrained_model_name_or_path": str(base)}
    stored["correction_end"] = 0.5
    save_adapter(model.adapter, folder, base_fingerprint={}, metadata={"correction": stored})
    to_default = build_config(AlignmentConfig, overrides=path | {"correction_end": "1"})
    whole_way = CorrectionConfig(correct=0.03, correction_rule="relative")
    assert recipe_of(ARMS["dpt_correct"], to_default).settings.correction == whole_way
    with pytest.raises(InputError, match="is of another correction_rule; give `correct` too"):
        recipe_of(ARMS["dpt_correct"], build_config(AlignmentConfig, overrides=path | {"correction_rule": "fixed"}))
    with pytest.raises(InputError, match="^correct is 0, which leaves the corrected arms uncorrected"):
        recipe_of(ARMS["dpt_correct"], build_config(AlignmentConfig, overrides=path | {"correct": "0"}))
    save_adapter(model.adapter, folder, base_fingerprint={}, metadata={"correction": {"correct": -1}})
    with pytest.raises(InputError, match="stored `correction` is not valid"):
        recipe_of(ARMS["dpt_correct"], none_given)


@pytest.mark.parametrize(
    "flag, arms, add",
    [
        ("control_lora", ("base", "dpt"), "control"),
        ("control_compute_lora", ("base", "control"), "control_compute"),
        ("onpolicy_lora", ("base", "dpt"), "dpt_onpolicy"),
        ("live_lora", ("base", "dpt"), "live"),
        ("probe_adapter", ("base", "dpt"), "base_correct"),
    ],
)
def test_weights_that_no_arm_uses_are_refused(base: Path, flag: str, arms: tuple[str, ...], add: str) -> None:
    given = {"control_lora": base / "run"} if "control" in arms else {}
    given["correction"] = CorrectionConfig()
    check_weights(config(base, arms=("base",), correction=CorrectionConfig()))
    with pytest.raises(InputError, match=f"^{flag} is given, and none of the arms uses it; add --arms {add}$"):
        check_weights(config(base, arms=arms, **given, **{flag: base / "nowhere"}))


def test_a_correction_beside_arms_without_one_is_refused(base: Path) -> None:
    with pytest.raises(InputError, match="a correction is set, and none of the arms is corrected; add --arms"):
        check_weights(config(base, arms=("base",)))


def test_a_lora_beside_arms_of_the_plain_base_is_refused(base: Path) -> None:
    settings = config(base, arms=("base",))
    with pytest.raises(InputError, match="^lora is given, and none of the arms uses it; add --arms dpt$"):
        check_weights(settings.model_copy(update={"model": settings.model.model_copy(update={"lora": "mine"})}))
    with pytest.raises(InputError, match="^adapter is given, and none of the arms uses it; add --arms dpt$"):
        check_weights(settings.model_copy(update={"model": settings.model.model_copy(update={"adapter": "mine"})}))


def test_a_correction_of_no_step_is_refused_before_anything_is_drawn(base: Path) -> None:
    late = CorrectionConfig(correct=0.1, correction_start=0.99)
    with pytest.raises(InputError, match="of 50 steps none is corrected between 0.99 and 1"):
        check_weights(config(base, arms=("base", "dpt_correct"), correction=late))
    fused = CorrectionConfig(correct=0.1, correction_fused=True, correction_mode="noise")
    with pytest.raises(InputError, match="`correction_fused` moves the next latent and needs `correction_mode` state"):
        check_weights(config(base, arms=("base", "dpt_correct"), correction=fused))
