"""`dpt score` and `dpt evaluate`: from a config to numbers and files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from dpt_t2i.adapter.io import WEIGHTS, adapter_folder
from dpt_t2i.backbones.fingerprint import part_hashes
from dpt_t2i.backbones.loading import choose_artifacts
from dpt_t2i.backbones.lora import lora_file
from dpt_t2i.config import AlignmentConfig, DataConfig, DiscriminationConfig, ScoreConfig
from dpt_t2i.data.index import RecordIndex
from dpt_t2i.data.sources import open_records
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.alignment import run_arms
from dpt_t2i.evaluation.arms import check_weights
from dpt_t2i.evaluation.examples import HeldOut, each_expression
from dpt_t2i.evaluation.itm import itm_scores, itm_summary
from dpt_t2i.evaluation.miner import miner_warnings
from dpt_t2i.evaluation.provenance import command_line, set_aside, versions, write_json, write_rows
from dpt_t2i.evaluation.rec import rec_oracle, rec_ranks, rec_summary
from dpt_t2i.evaluation.seen import seen_warnings
from dpt_t2i.files import file_hash, save_picture
from dpt_t2i.sampling.annotate import annotate
from dpt_t2i.sampling.images import open_image
from dpt_t2i.sampling.model import T2IModel, load_model, open_model
from dpt_t2i.sampling.scoring import MatchScorer, check_score_timestep
from dpt_t2i.sampling.shares import gathered, processes, share_of

log = logging.getLogger(__name__)


def run_score(config: ScoreConfig, image: Path, prompt: str) -> dict[str, Any]:
    """Score a picture against a prompt; writes `score.json` and the picture with the phrases' boxes.

    Raises:
        InputError: the picture cannot be read, there is no adapter, or the prompt is empty.
    """
    picture = open_image(image)
    judged = open_model(config.model).score(picture, prompt, config.score_timestep, config.score_draws, config.seed)
    annotated = config.output_dir / f"{image.stem}_annotated.png"
    settings = config.model_dump(mode="json") | {"image": str(image), "prompt": prompt}
    result = {
        "prompt": prompt,
        "image": str(image),
        "score": judged.score,
        "phrases": [asdict(evidence) for evidence in judged.phrases],
        "settings": settings,
        "versions": versions(),
    }
    set_aside(settings, config.output_dir / "score.json", annotated)
    write_json(config.output_dir / "score.json", result)
    save_picture(annotate(picture, judged.marks()), annotated)
    lines = [f"score {judged.score:+.3f}  {prompt}"]
    for e in judged.phrases:
        left, top, right, bottom = (f"{value:.0f}" for value in e.box)
        box = f"{left}, {top}) to ({right}, {bottom}"
        lines.append(f"  {e.phrase}: box ({box}), confidence {e.confidence:.2f}, alone {e.score:+.3f}")
    return result | {"annotated": str(annotated), "summary": lines}


def run_alignment(config: AlignmentConfig) -> dict[str, Any]:
    """Compare arms on a prompt suite; see `alignment.run_arms`."""
    model = config.model
    check_weights(config)
    if model.pretrained_model_name_or_path != "bundled":
        log.info("the checker knows the drawn world alone; `dpt evaluate images` judges pictures of another kind")

    def open_model(lora: Path | None, adapter: Path | None) -> T2IModel:
        loaded = load_model(
            model.pretrained_model_name_or_path,
            str(lora or "none"),
            str(adapter or "none"),
            model.device,
            model.dtype,
            model.revision,
        )
        check_score_timestep(loaded.backbone, config.search.score_timestep)  # the first arms may draw without it
        return loaded

    result = run_arms(config, open_model)
    if not result:
        return {"arms": {}, "summary": []}
    warnings = _alignment_warnings(result)
    return result | {"warnings": warnings, "summary": [*_alignment_lines(result), *warnings]}


def run_itm(config: DiscriminationConfig) -> dict[str, Any]:
    """Image-text matching accuracy on held-out records; writes `itm.json` and every score to `itm_scores.jsonl`.

    Several processes score a part each; the main one writes.

    Raises:
        InputError: no adapter, no record with a hard negative, `all_expressions`, or a NaN (names the example).
    """
    if config.all_expressions:
        raise InputError("all_expressions is for `dpt evaluate rec`; matching reads one caption a record")
    state = processes(config.model.device)
    scorer = _scorer(config)
    examples = _examples(config, scorer, state)
    how: dict[str, Any] = {"seed": config.seed, "batch_size": config.eval_batch_size, "first": examples.first}
    rows = gathered(itm_scores(scorer, examples, _timesteps(config, scorer), **how), state)
    if not state.is_main_process:
        return {"summary": []}
    summary = itm_summary(rows)
    if not any("text" in accuracies or "image" in accuracies for accuracies in summary.values()):
        raise InputError(
            f"data set `{config.data.dataset}` has no hard negatives, nor captions that a rule of `dpt data perturb` "
            "knows; give records with `negatives`"
        )
    result_file, rows_file = config.output_dir / "itm.json", config.output_dir / "itm_scores.jsonl"
    set_aside(config.model_dump(mode="json"), result_file, rows_file)
    write_rows(rows_file, (asdict(row) for row in rows))
    warnings = miner_warnings(Path(config.data.dataset), part_hashes(scorer.backbone.pipeline), "matching score")
    warnings += seen_warnings(config.data, scorer.adapter.origin)
    if unseen := {row.id for row in rows if row.unseen}:
        warnings.append(
            f"warning: {len(unseen)} hard captions are not counted: the text encoder reads them as the true one (they "
            f"differ behind its limit, or in capitals alone), such as that of {min(unseen)}"
        )
    result = {"timesteps": summary, "warnings": warnings} | _origin(config, len({row.id for row in rows}))
    write_json(result_file, result)
    return result | {"summary": [*_lines(summary, ("text", "image", "both")), *warnings]}


def run_rec(config: DiscriminationConfig) -> dict[str, Any]:
    """Grounding precision on held-out records, beside the learning-free oracle; writes `rec.json`, `rec_ranks.jsonl`.

    Several processes read a part each; the main one writes.

    Raises:
        InputError: no adapter, no record with an expression, or a NaN (names the example).
    """
    state = processes(config.model.device)
    scorer = _scorer(config)
    examples = _examples(config, scorer, state)
    timesteps = _timesteps(config, scorer)
    how: dict[str, Any] = {"seed": config.seed, "batch_size": config.eval_batch_size, "first": examples.first_grounded}
    rows = gathered(rec_ranks(scorer, examples, timesteps, **how), state)
    blind = gathered(rec_oracle(scorer.backbone, examples, timesteps, **how), state)
    if not state.is_main_process:
        return {"summary": []}
    if not rows:
        raise InputError(f"data set `{config.data.dataset}` has no expressions; give records with `expressions`")
    summary, oracle = rec_summary(rows), rec_summary(blind, at=(1,))
    result_file, rows_file = config.output_dir / "rec.json", config.output_dir / "rec_ranks.jsonl"
    set_aside(config.model_dump(mode="json"), result_file, rows_file)
    write_rows(rows_file, (asdict(row) for row in rows))
    warnings = seen_warnings(config.data, scorer.adapter.origin)
    result = {"timesteps": summary, "oracle": oracle, "warnings": warnings}
    result |= _origin(config, len({row.id for row in rows}))
    write_json(result_file, result)
    lines = _lines(summary, ("precision@1", "precision@5", "precision@10"))
    lines += [f"oracle, {line}" for line in _lines(oracle, ("precision@1",))]
    return result | {"summary": [*lines, *warnings]}


def _scorer(config: DiscriminationConfig) -> MatchScorer:
    scorer = open_model(config.model).scorer
    if scorer is None:
        raise InputError("this evaluation needs an adapter; give `adapter`, or a base that ships one")
    return scorer


def _timesteps(config: DiscriminationConfig, scorer: MatchScorer) -> tuple[int, ...]:
    for timestep in config.timesteps:
        if not 0 <= timestep < scorer.backbone.num_train_timesteps:
            raise InputError(f"timestep {timestep} is not in 0..{scorer.backbone.num_train_timesteps - 1}")
    return tuple(dict.fromkeys(config.timesteps))


def _examples(config: DiscriminationConfig, scorer: MatchScorer, state: PartialState) -> HeldOut:
    """This process's part of the held-out examples."""
    _refuse_trainings(config.data)
    size = config.data.resolution or min(scorer.backbone.image_size)
    records = open_records(config.data, "val", size)
    if config.all_expressions:
        records = RecordIndex(each_expression(records))
    return HeldOut(records, size, share_of(len(records), state))


def _refuse_trainings(data: DataConfig) -> None:
    """Settings of the data that only training reads. Raises `InputError`."""
    if data.max_samples is not None and data.data_format != "huggingface":  # there it is how many rows are fetched
        raise InputError("max_samples limits what is trained on; --val_samples says how many records are measured")
    for name in ("scene_categories", "dataloader_num_workers", "exclude_refs"):
        if getattr(data, name):
            raise InputError(f"{name} is for training and changes nothing here; leave it out")


def _origin(config: DiscriminationConfig, examples: int) -> dict[str, Any]:
    model = config.model
    lora, adapter = choose_artifacts(model.pretrained_model_name_or_path, model.lora, model.adapter, model.revision)
    return {
        "examples": examples,
        "weights": {
            "lora": None if lora is None else file_hash(lora_file(lora)),
            "adapter": None if adapter is None else file_hash(adapter_folder(adapter) / WEIGHTS),
        },
        "settings": config.model_dump(mode="json"),
        "command": command_line(),
        "versions": versions(),
    }


def _lines(summary: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    lines = []
    for timestep, numbers in summary.items():
        shares = [
            f"{name} {100 * numbers[name]['accuracy']:.1f} % "
            f"[{100 * numbers[name]['low']:.1f}, {100 * numbers[name]['high']:.1f}]"
            for name in names
            if name in numbers
        ]
        lines.append(f"timestep {timestep}: " + ", ".join(shares))
    return lines


def _alignment_lines(result: Mapping[str, Any]) -> list[str]:
    width = max(len(name) for name in result["arms"])
    lines = [
        f"{result['suite']}: {result['prompts']} prompts, seeds {', '.join(map(str, result['seeds']))}; right images, %"
    ]
    for name, numbers in result["arms"].items():
        parts = ", ".join(f"{key} {100 * numbers[key]:.1f}" for key in result["categories"])
        lines.append(f"{name:<{width}}  {100 * numbers['overall']:5.1f}  ({parts})")
    for pair, d in result["differences"].items():
        lines.append(f"{pair}: {100 * d['mean']:+.1f} points, 95 % [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]")
    return lines


def _alignment_warnings(result: Mapping[str, Any]) -> list[str]:
    warnings = []
    if single := [name for name, count in result["categories"].items() if count == 1]:
        warnings.append(f"warning: one prompt tells no spread, so intervals are too narrow: {', '.join(single)}")
    if all(numbers["overall"] == 0 for numbers in result["arms"].values()):
        warnings.append(
            "warning: no arm drew a single right image: the checker knows the drawn world alone, which this model does "
            "not draw; `dpt evaluate images` judges others"
        )
    return warnings
