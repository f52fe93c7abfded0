import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dpt_t2i
from dpt_t2i.adapter.types import AdapterOrigin
from dpt_t2i.backbones.lora import add_lora, lora_parameters
from dpt_t2i.config import CorrectionConfig
from dpt_t2i.errors import InputError
from dpt_t2i.publish.session import Session, evidence_rows
from dpt_t2i.sampling.folder import read_parameters
from dpt_t2i.sampling.model import T2IModel
from tests.tiny import tiny_adapter, tiny_backbone

HOW = {"steps": 3, "guidance_scale": 2.0, "eta": 0.0, "correct": 0.2, "correction_rule": "relative"}
PROMPT = "a red circle and a blue square"


def model(lora: bool = True, adapter: bool = True) -> T2IModel:
    backbone = tiny_backbone()
    if lora:
        for number, parameter in enumerate(add_lora(backbone, 2)):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
            parameter.requires_grad_(False)
    return T2IModel(backbone, tiny_adapter(backbone).requires_grad_(False) if adapter else None)


def session(folder: Path, **parts: bool) -> Session:
    return Session(model(**parts), folder)


def same(image: Image.Image, other: Image.Image) -> bool:
    return image.tobytes() == other.tobytes()


def test_both_pictures_are_what_the_command_would_draw(tmp_path):
    ours, plain = session(tmp_path), model(lora=False)
    uncorrected = HOW | {"correct": 0.0}
    drawing = ours.draw(f"  {PROMPT} ", 7, "plain base", HOW)
    assert drawing.seed == 7
    assert same(drawing.steered.image, ours.model.generate(PROMPT, 7, **HOW)[0])
    assert same(drawing.beside.image, plain.generate(PROMPT, 7, **uncorrected)[0])
    tuned = ours.draw(PROMPT, 7, "tuned alone", HOW).beside.image
    assert same(tuned, ours.model.generate(PROMPT, 7, **uncorrected)[0])
    assert not same(tuned, drawing.beside.image) and not same(tuned, drawing.steered.image)
    assert ours.draw(PROMPT, 7, "nothing", HOW).beside is None


def test_the_files_carry_their_settings_and_nothing_is_drawn_over(tmp_path):
    ours = session(tmp_path)
    first = ours.draw(PROMPT, 7, "plain base", HOW)
    assert first.steered.file == tmp_path / "tuned+correct/images/00000_7.png"
    assert first.beside.file == tmp_path / "base/images/00000_7.png"
    again = Session(ours.model, tmp_path).draw(PROMPT, 7, "tuned alone", HOW)  # a later session in the same folder
    assert [drawn.file.name for drawn in (again.steered, again.beside)] == ["00001_7.png"] * 2
    steered, beside = (read_parameters(drawn.file) for drawn in (first.steered, first.beside))
    assert steered["prompt"] == beside["prompt"] == PROMPT and steered["seed"] == 7
    assert steered["settings"]["correction"]["correct"] == 0.2 and beside["settings"]["correction"]["correct"] == 0.0
    assert steered["settings"]["lora"] is not None and steered["settings"]["adapter"] is not None
    # Nothing that was learned had a part in the plain picture, and it is not scored by half a model.
    assert beside["settings"]["lora"] is None and beside["settings"]["adapter"] is None
    assert steered["result"]["score"] is not None and beside["result"]["score"] is None
    with Image.open(first.beside.file) as stored:
        assert same(stored.convert("RGB"), first.beside.image)


def test_one_judge_judges_both(tmp_path):
    ours = session(tmp_path)
    drawing = ours.draw(PROMPT, 1, "plain base", HOW)
    for drawn in (drawing.steered, drawing.beside):
        assert drawn.judgement == ours.model.score(drawn.image, PROMPT)
    assert [row[0] for row in evidence_rows(drawing.steered.judgement)] == ["red circle", "blue square"]
    confidence, alone = map(float, evidence_rows(drawing.steered.judgement)[1][1:])
    second = drawing.steered.judgement.phrases[1]
    assert confidence == pytest.approx(second.confidence, abs=0.005) and alone == pytest.approx(second.score, abs=5e-4)
    bare, boxed = drawing.steered.shown(boxes=False), drawing.steered.shown(boxes=True)
    assert bare.size == boxed.size == (512, 512) and not same(bare, boxed)
    assert np.array_equal(np.asarray(bare)[::16, ::16], np.asarray(drawing.steered.image))


def test_the_curve_is_the_score_of_each_corrected_latent(tmp_path):
    ours = session(tmp_path)
    seen: list[torch.Tensor] = []
    score = ours.model.scorer
    ours.model.scorer = lambda z, t, text: seen.append((s := score(z, t, text)).detach()) or s
    ours.model.score = lambda *_: None  # not what is asked here
    ours.model.judge = lambda *_: None
    curve = ours.draw(PROMPT, 1, "nothing", HOW | {"correction_end": 0.5}).curve
    assert [step for step, _ in curve] == [1, 2]  # of three steps those that begin before the middle
    assert [value for _, value in curve] == pytest.approx([float(value) for value in seen])
    assert ours.draw(PROMPT, 1, "nothing", HOW | {"correct": 0.0}).curve == ()


def test_a_search_keeps_its_best_and_has_no_curve(tmp_path):
    ours = session(tmp_path)
    drawing = ours.draw(PROMPT, 1, "nothing", HOW | {"best_of": 2})
    assert drawing.curve == () and drawing.steered.file.parts[-3] == "tuned+correct+best_of_2"
    assert same(drawing.steered.image, ours.model.generate(PROMPT, 1, best_of=2, **HOW)[0])


def test_progress_counts_candidates_that_are_drawn_at_once(tmp_path):
    told: list[tuple[float, str]] = []
    session(tmp_path).draw(PROMPT, 1, "plain base", HOW | {"best_of": 2, "correct": 0.0}, lambda *w: told.append(w))
    assert [share for share, _ in told] == pytest.approx([0, 1 / 9, 2 / 9, 3 / 9, 3 / 9, 5 / 9, 7 / 9, 1])


def test_progress_counts_the_steps_of_all_passes(tmp_path):
    told: list[tuple[float, str]] = []
    session(tmp_path).draw(PROMPT, 1, "plain base", HOW | {"best_of": 2}, lambda *what: told.append(what))
    shares = [share for share, _ in told]
    assert shares == pytest.approx([0, 1 / 9, 2 / 9, 3 / 9, 3 / 9, 4 / 9, 5 / 9, 6 / 9, 7 / 9, 8 / 9, 1])
    assert [what for _, what in told] == ["plain base"] * 4 + ["as asked"] * 7


def test_any_seed_is_told_and_a_setting_left_empty_is_the_default(tmp_path):
    ours = session(tmp_path)
    seeds = {ours.draw("a star", None, "nothing", {"steps": 1, "guidance_scale": None}).seed for _ in range(3)}
    assert len(seeds) == 3 and all(0 <= seed < 2**31 for seed in seeds)
    assert read_parameters(next(tmp_path.glob("tuned/images/*.png")))["settings"]["sample"]["guidance_scale"] == 7.5


def test_without_lora_or_adapter_less_is_offered(tmp_path):
    plain, bare = session(tmp_path, lora=False), session(tmp_path, lora=False, adapter=False)
    assert session(tmp_path).choices() == ("plain base", "tuned alone", "nothing")
    assert plain.choices() == bare.choices() == ("plain base", "nothing")
    drawing = plain.draw(PROMPT, 1, "plain base", HOW)
    assert drawing.steered.file.parts[-3] == "base+correct" and drawing.beside.file.parts[-3] == "base"
    assert read_parameters(drawing.steered.file)["settings"]["adapter"] is not None
    alone = bare.draw(PROMPT, 1, "plain base", {"steps": 1}).steered
    assert alone.judgement is None and evidence_rows(None) == [] and same(alone.shown(True), alone.shown(False))
    with pytest.raises(InputError, match="needs an adapter"):
        bare.judge(Image.new("RGB", (8, 8)), PROMPT, 250, 1)


def test_the_stored_correction_is_where_the_page_starts(tmp_path):
    ours = session(tmp_path)
    assert ours.stored_correction == CorrectionConfig()
    stored = {"correct": 0.07, "correction_rule": "relative", "correction_end": 0.5}
    ours.model.adapter.origin = AdapterOrigin(ours.model.backbone.fingerprint(), {"correction": stored})
    assert ours.stored_correction == CorrectionConfig(**stored)
    # What the page has no field for is drawn as stored too; a field of the page stands before it.
    every = stored | {"correction_every": 2}
    ours.model.adapter.origin = AdapterOrigin(ours.model.backbone.fingerprint(), {"correction": every})
    drawn = ours.draw(PROMPT, 1, "nothing", {"steps": 4, "correct": 0.2, "correction_end": 1.0})
    used = read_parameters(drawn.steered.file)["settings"]["correction"]
    assert (used["correct"], used["correction_every"], used["correction_end"]) == (0.2, 2, 1.0)
    assert used["correction_rule"] == "relative" and [step for step, _ in drawn.curve] == [1, 3]
    plain = ours.draw(PROMPT, 1, "nothing", {"steps": 1, "correct": 0.0}).steered.file
    assert read_parameters(plain)["settings"]["correction"]["correct"] == 0
    ours.model.adapter.origin = AdapterOrigin(ours.model.backbone.fingerprint(), {"correction": {"corect": 1}})
    with pytest.raises(InputError, match="corect"):
        _ = ours.stored_correction
    assert dpt_t2i.load("bundled", device="cpu").adapter.origin.metadata["correction"]["correct"] > 0


@pytest.mark.parametrize(
    ("prompt", "settings", "said"),
    [
        (" ", {}, "the prompt is empty"),
        ("a star", {"steps": 0}, "steps"),
        ("a star", {"height": 33}, "height 33 must be a positive multiple of 4"),
        ("a star", {"stepz": 2}, "did you mean `steps`"),
        ("a star", {"width": 132}, "width 132 is too large here; give at most 128"),
    ],
)
def test_bad_input_is_one_line_and_the_model_stays_whole(tmp_path, prompt, settings, said):
    ours = session(tmp_path)
    with pytest.raises(InputError, match=said):
        ours.draw(prompt, 0, "plain base", {"steps": 1} | settings)
    tuned = ours.draw("a star", 0, "tuned alone", {"steps": 1})  # the LoRA is on again, the lock open
    assert same(tuned.steered.image, tuned.beside.image) and lora_parameters(ours.model.backbone)


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    ours = session(tmp_path)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ours.model, "run", full)
    with pytest.raises(InputError, match="not enough memory"):
        ours.draw("a star", 0, "plain base", {"steps": 1})


def test_two_threads_do_not_draw_into_each_other(tmp_path):
    ours = session(tmp_path)
    alone = [ours.draw(PROMPT, seed, "plain base", HOW) for seed in (1, 2)]
    drawn: dict[int, object] = {}
    threads = [
        threading.Thread(target=lambda s=seed: drawn.setdefault(s, ours.draw(PROMPT, s, "plain base", HOW)))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in zip((1, 2), alone, strict=True):
        assert same(drawn[seed].steered.image, expected.steered.image)
        assert same(drawn[seed].beside.image, expected.beside.image)
    assert len(list(tmp_path.glob("*/images/*.png"))) == 8
