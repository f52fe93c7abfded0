"""The arms of the alignment comparison, and the pairs worth comparing. Everything else is equal between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from dpt_t2i.adapter.io import read_adapter_card
from dpt_t2i.backbones.loading import choose_artifacts
from dpt_t2i.backbones.lora import lora_file
from dpt_t2i.config import AlignmentConfig, CorrectionConfig, GenerateConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.loop import check_correction


@dataclass(frozen=True)
class Arm:
    """One way of turning a prompt and a seed into an image."""

    name: str
    lora: str  # `none`, `dpt`, `control`, ...: a row of `_LORAS`
    adapter: str = "none"  # a row of `_ADAPTERS`; it corrects and ranks, and changes no image otherwise
    corrected: bool = False
    judges: bool = False  # the LoRA serves the adapter alone, and the plain base draws
    best_of: int = 1  # candidates an image; the first has the seed itself, so it is the image of the arm without search
    random_of: str | None = None  # the expectation of a blind pick among that arm's candidates; no images of its own


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("base", "none"),
        Arm("base_correct", "none", "probe", corrected=True),
        Arm("base_correct_best4", "none", "probe", corrected=True, best_of=4),
        Arm("base_correct_random", "none", "probe", best_of=4, random_of="base_correct_best4"),
        Arm("control", "control"),
        Arm("control_compute", "control_compute"),
        Arm("dpt", "dpt", "dpt"),
        Arm("dpt_correct", "dpt", "dpt", corrected=True),
        Arm("dpt_best4", "dpt", "dpt", best_of=4),
        Arm("random", "dpt", "dpt", best_of=4, random_of="dpt_best4"),
        Arm("dpt_correct_best4", "dpt", "dpt", corrected=True, best_of=4),
        Arm("dpt_correct_random", "dpt", "dpt", best_of=4, random_of="dpt_correct_best4"),
        Arm("judge_correct", "dpt", "dpt", corrected=True, judges=True),
        Arm("judge_best4", "dpt", "dpt", corrected=True, judges=True, best_of=4),
        Arm("judge_random", "dpt", "dpt", judges=True, best_of=4, random_of="judge_best4"),
        Arm("dpt_onpolicy", "onpolicy", "onpolicy"),
        Arm("live", "live", "live"),
        Arm("live_correct", "live", "live", corrected=True),
    )
}
PAIRS: tuple[tuple[str, str], ...] = (
    ("dpt", "base"),
    ("dpt", "control"),
    ("dpt", "control_compute"),
    ("control", "base"),
    ("control_compute", "base"),
    ("base_correct", "base"),
    ("base_correct_best4", "base_correct"),
    ("base_correct_best4", "base_correct_random"),
    ("base_correct_best4", "base"),
    ("dpt_correct", "dpt"),
    ("dpt_correct", "base"),
    ("dpt_best4", "dpt"),
    ("dpt_best4", "random"),
    ("dpt_best4", "base"),
    ("dpt_correct_best4", "dpt_correct"),
    ("dpt_correct_best4", "dpt_correct_random"),
    ("dpt_correct_best4", "dpt_best4"),
    ("dpt_correct_best4", "base"),
    ("judge_correct", "base"),
    ("judge_correct", "base_correct"),
    ("judge_correct", "dpt_correct"),
    ("judge_best4", "judge_correct"),
    ("judge_best4", "judge_random"),
    ("judge_best4", "base"),
    ("dpt_onpolicy", "dpt"),
    ("dpt_onpolicy", "base"),
    ("live", "base"),
    ("live_correct", "live"),
    ("dpt", "live"),
)


@dataclass(frozen=True)
class Recipe:
    """What an arm needs, found and checked before anything is made."""

    lora: Path | None
    adapter: Path | None
    settings: GenerateConfig  # of one candidate: the search is done by the evaluation, which judges all candidates


def choose_arms(names: Sequence[str]) -> list[Arm]:
    """The named arms, in the order of the table.

    Raises:
        InputError: an unknown name, or an arm without the one whose candidates it picks from.
    """
    for name in names:
        if name not in ARMS:
            raise InputError(f"unknown arm `{name}`; there are {', '.join(ARMS)}")
    for name in names:
        needed = ARMS[name].random_of
        if needed is not None and needed not in names:
            raise InputError(f"arm `{name}` picks from the images of `{needed}`; add --arms {needed}")
    return [arm for arm in ARMS.values() if arm.name in names]


def recipe_of(arm: Arm, config: AlignmentConfig) -> Recipe:
    """Find an arm's weights and settings.

    Raises:
        InputError: a LoRA or adapter that the arm needs was neither given nor ships, no correction strength is known,
            the correction corrects nothing (`check_correction`), `lora_draws` is off, `best_of` is given, or the
            correction is fused and the LoRA only judges.
    """
    if not config.sample.lora_draws:
        raise InputError("`no_lora_draws` is what arms differ in; leave it out and name judge_correct or judge_best4")
    if config.search.best_of > 1:
        raise InputError("`best_of` is what arms differ in; leave it out and name dpt_best4, beside random")
    base, revision = config.model.pretrained_model_name_or_path, config.model.revision
    for_lora, for_adapter = _LORAS[arm.lora], _ADAPTERS[arm.adapter]
    lora, adapter = choose_artifacts(base, for_lora.of(config), for_adapter.of(config), revision)
    if arm.lora != "none" and lora is None:
        raise InputError(f"arm `{arm.name}` needs a LoRA: give --{for_lora.flag}")
    if (arm.corrected or arm.best_of > 1) and adapter is None:
        raise InputError(f"arm `{arm.name}` needs an adapter: give --{for_adapter.flag}")
    correction = _correction(config, adapter) if arm.corrected else CorrectionConfig()
    if arm.judges and correction.correction_fused:
        raise InputError(f"arm `{arm.name}` draws by the plain base, which correction_fused cannot; leave that out")
    settings = GenerateConfig(
        model=config.model,
        own_noise=config.own_noise,
        sample=config.sample.model_copy(update={"lora_draws": not arm.judges}),
        correction=correction,
        search=config.search,
        seed=config.seed,
    )
    check_correction(correction, settings.sample)
    return Recipe(lora, adapter, settings)


def check_weights(config: AlignmentConfig) -> None:
    """Look for the files of all arms, before the first of them draws for hours.

    Raises:
        InputError: as `recipe_of`; or a LoRA or adapter is not where it was said to be, or no arm uses it.
    """
    arms = choose_arms(config.arms)
    _refuse_unread(config, arms)
    for arm in arms:
        if arm.random_of is not None:
            continue
        recipe = recipe_of(arm, config)
        if recipe.lora is not None:
            lora_file(recipe.lora)
        if recipe.adapter is not None:
            read_adapter_card(recipe.adapter)


def _refuse_unread(config: AlignmentConfig, arms: Sequence[Arm]) -> None:
    """Weights that were given and that no arm uses: their arm was forgotten."""
    for flag, given, users in (
        ("control_lora", config.control_lora, ["control"]),
        ("control_compute_lora", config.control_compute_lora, ["control_compute"]),
        ("onpolicy_lora", config.onpolicy_lora, ["dpt_onpolicy"]),
        ("live_lora", config.live_lora, ["live", "live_correct"]),
        ("probe_adapter", config.probe_adapter, [arm.name for arm in ARMS.values() if arm.adapter == "probe"]),
        ("lora", config.model.lora, [arm.name for arm in ARMS.values() if arm.lora == "dpt"]),
        ("adapter", config.model.adapter, [arm.name for arm in ARMS.values() if arm.adapter == "dpt"]),
    ):
        if given not in (None, "none") and not {arm.name for arm in arms} & set(users):
            raise InputError(f"{flag} is given, and none of the arms uses it; add --arms {users[0]}")
    if config.correction != CorrectionConfig() and not any(arm.corrected for arm in arms):
        raise InputError("a correction is set, and none of the arms is corrected; add --arms dpt_correct")


@dataclass(frozen=True)
class _Source:
    """Where weights of an arm come from."""

    flag: str  # by which a user gives them
    of: Callable[
        [AlignmentConfig], str | None
    ]  # a path, `none`, or None = what ships with the base or lies beside a LoRA


_LORAS: dict[str, _Source] = {
    "none": _Source("lora", lambda _: "none"),
    "dpt": _Source("lora", lambda config: config.model.lora),
    "control": _Source("control_lora", lambda config: _text(config.control_lora, "none")),
    "control_compute": _Source("control_compute_lora", lambda config: _text(config.control_compute_lora, "none")),
    "onpolicy": _Source("onpolicy_lora", lambda config: _text(config.onpolicy_lora, "none")),
    "live": _Source("live_lora", lambda config: _text(config.live_lora, "none")),
}
_BESIDE = "with an `adapter` folder beside it"
_ADAPTERS: dict[str, _Source] = {
    "none": _Source("adapter", lambda _: "none"),
    "dpt": _Source("adapter", lambda config: config.model.adapter),
    "probe": _Source("probe_adapter", lambda config: _text(config.probe_adapter, None)),
    "onpolicy": _Source(f"onpolicy_lora {_BESIDE}", lambda _: None),
    "live": _Source(f"live_lora {_BESIDE}", lambda _: None),
}


def _text(path: Path | None, otherwise: str | None) -> str | None:
    return otherwise if path is None else str(path)


def _correction(config: AlignmentConfig, adapter: Path | None) -> CorrectionConfig:
    """What is stored with the adapter under `correction`, but for what was given. With a strength that was given, all
    is as given: a strength means another thing under another rule."""
    if config.correction.correct > 0:
        return config.correction
    given = config.correction.model_dump(exclude_unset=True)  # a value that is the default counts where it was given
    if "correct" in given:
        raise InputError("correct is 0, which leaves the corrected arms uncorrected; give a strength, or leave it out")
    stored = read_adapter_card(adapter)["metadata"].get("correction") if adapter is not None else None
    if not stored:
        raise InputError(
            f"no correction strength: adapter {adapter} has none stored; give --correct, for instance 0.05 with "
            "--correction_rule relative"
        )
    CorrectionConfig.check_rule(stored, given)
    try:
        return CorrectionConfig.model_validate({**stored, **given})
    except ValidationError as error:
        raise InputError(
            f"adapter {adapter}: its stored `correction` is not valid: {error.errors()[0]['msg']}"
        ) from error
