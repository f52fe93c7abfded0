import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import dpt_t2i
from dpt_t2i.adapter.io import save_adapter
from dpt_t2i.backbones.fingerprint import config_hash
from dpt_t2i.backbones.lora import add_lora, save_lora
from dpt_t2i.config import GenerateConfig, build_config
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.generate import jobs_of
from dpt_t2i.sampling.model import T2IModel
from dpt_t2i.sampling.noise import shared_noise
from tests.tiny import tiny_adapter, tiny_backbone, tiny_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A saved base that ships a tuned LoRA, its adapter, and a probe adapter."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_pipeline().save_pretrained(folder)
    backbone = tiny_backbone()
    fingerprint = backbone.fingerprint()
    save_adapter(tiny_adapter(backbone, seed=1), folder / "dpt/probe/adapter", base_fingerprint=fingerprint)
    save_adapter(
        tiny_adapter(backbone, "bottom0_up1", seed=2), folder / "dpt/tuned/adapter", base_fingerprint=fingerprint
    )
    for number, parameter in enumerate(add_lora(backbone, 2)):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    save_lora(backbone, folder / "dpt/tuned", {})
    return folder


def test_importing_the_package_does_not_import_torch():
    code = "import sys, dpt_t2i, dpt_t2i.config; sys.exit('torch' in sys.modules or not callable(dpt_t2i.load))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": str(Path(dpt_t2i.__file__).parents[1])}
        ).returncode
        == 0
    )


def test_what_ships_is_loaded_and_can_be_refused(base):
    tuned = dpt_t2i.load(str(base), device="cpu")
    plain = dpt_t2i.load(str(base), lora="none", device="cpu")
    bare = dpt_t2i.load(str(base), lora="none", adapter="none", device="cpu")
    assert [tap.name for tap in tuned.scorer.taps] == ["bottom0", "up1"]
    assert [tap.name for tap in plain.scorer.taps] == ["up1"]
    assert bare.adapter is None
    images = [model.generate("a red circle", steps=2)[0].tobytes() for model in (tuned, plain, bare)]
    assert images[0] != images[1] == images[2]
    assert tuned.pipeline("a red circle", num_inference_steps=1).images[0].size == (32, 32)
    decisive = [model.settings(GenerateConfig()) for model in (tuned, plain)]
    told = tiny_backbone().fingerprint()
    same = {"name": "base", "config": config_hash(tiny_pipeline())} | {k: told[k] for k in ("weights", "parts")}
    assert decisive[0]["base"] == decisive[1]["base"] == same
    assert decisive[0]["lora"] is not None and decisive[1]["lora"] is None
    assert decisive[0]["adapter"] != decisive[1]["adapter"]


def test_an_adapter_with_another_lora_than_its_own_is_a_warning_that_names_both(base, tmp_path, caplog):
    backbone = tiny_backbone()
    fingerprint = {**backbone.fingerprint(), "lora": "0123456789abcdef"}
    save_adapter(tiny_adapter(backbone), tmp_path / "adapter", base_fingerprint=fingerprint)
    shipped = dpt_t2i.load(str(base), device="cpu").settings(GenerateConfig())["lora"]
    caplog.clear()
    dpt_t2i.load(str(base), adapter=str(tmp_path / "adapter"), device="cpu")
    (record,) = [record for record in caplog.records if record.name.startswith("dpt_t2i")]
    assert "LoRA 0123456789abcdef" in record.getMessage() and f"LoRA {shipped}" in record.getMessage()
    save_adapter(
        tiny_adapter(backbone), tmp_path / "adapter", base_fingerprint={**backbone.fingerprint(), "lora": shipped}
    )
    caplog.clear()
    dpt_t2i.load(str(base), adapter=str(tmp_path / "adapter"), device="cpu")
    assert not [record for record in caplog.records if record.name.startswith("dpt_t2i")]


def model(adapter: bool = True) -> T2IModel:
    backbone = tiny_backbone()
    return T2IModel(backbone, tiny_adapter(backbone) if adapter else None)


def test_generate_takes_the_flags_of_the_command():
    ours = model()
    images = ours.generate(["a star", "a red circle"], seeds=[0, 1], steps=2, guidance_scale=1.0, height=16)
    assert [image.size for image in images] == [(32, 16)] * 4
    assert images[2].tobytes() == ours.generate("a red circle", 0, steps=2, guidance_scale=1.0, height=16)[0].tobytes()
    with pytest.raises(InputError, match="`stepz`; did you mean `steps`"):
        ours.generate("a star", stepz=2)


def test_the_plain_base_draws_and_the_lora_judges(base, monkeypatch):
    tuned, plain = (dpt_t2i.load(str(base), lora=lora, device="cpu") for lora in (None, "none"))
    how = {"steps": 3, "eta": 0.0}
    drawn = tuned.generate("a red circle", lora_draws=False, **how)[0]
    assert drawn.tobytes() == plain.generate("a red circle", **how)[0].tobytes()
    corrected = {"correct": 0.3, "correction_rule": "relative", **how}
    image = tuned.generate("a red circle", lora_draws=False, **corrected)[0]
    # By hand: the plain base, and as its scorer the tuned model in a denoiser of its own.
    plain.scorer = tuned.scorer
    assert image.tobytes() == plain.generate("a red circle", **corrected)[0].tobytes() != drawn.tobytes()
    assert image.tobytes() != tuned.generate("a red circle", **corrected)[0].tobytes()
    jobs, config = jobs_of(["a red circle"], [0]), build_config(GenerateConfig, overrides=how | {"lora_draws": False})
    (scored,) = tuned.run(jobs, config)
    latents, text = scored.latents[None], tuned.backbone.encode_text(["a red circle"])
    assert scored.score == pytest.approx(float(tuned.judge(250, config.search.score_draws, 0)(latents, text)))
    with pytest.raises(InputError, match="`lora_draws` off .* leave correction_fused out"):
        tuned.generate("a red circle", lora_draws=False, correction_fused=True, **corrected)


@pytest.mark.parametrize("without", ["lora", "adapter"])
def test_a_judge_needs_a_lora_and_its_adapter(base, without):
    model = dpt_t2i.load(str(base), device="cpu", **{without: "none"})
    with pytest.raises(InputError, match="`no_lora_draws` .* needs a LoRA and its adapter"):
        model.generate("a red circle", steps=1, lora_draws=False)


def test_best_of_and_correction_need_an_adapter():
    with pytest.raises(InputError, match="best_of.*needs an adapter"):
        model(adapter=False).generate("a star", steps=1, best_of=2)
    with pytest.raises(InputError, match="correct.*needs an adapter"):
        model(adapter=False).generate("a star", steps=1, correct=0.5)
    with pytest.raises(InputError, match="scoring needs an adapter"):
        model(adapter=False).score(Image.new("RGB", (32, 32)), "a star")
    assert len(model().generate("a star", steps=1, best_of=2, correct=0.5)) == 1


def test_score_is_the_mean_over_the_fixed_noises():
    ours = model()
    image = ours.generate("a red circle", steps=2)[0]
    result = ours.score(image, "a red circle", timestep=300, draws=2, seed=5)
    backbone = ours.backbone
    pixels = torch.tensor(list(image.tobytes())).reshape(1, 32, 32, 3).permute(0, 3, 1, 2) / 127.5 - 1
    text = backbone.encode_text(["a red circle"])
    with torch.no_grad():
        latents = backbone.encode_image(pixels)
        noisy = [
            backbone.add_noise(latents, shared_noise(5, draw, (4, 8, 8))[None], torch.tensor([300])) for draw in (0, 1)
        ]
        expected = sum(float(ours.scorer(z, torch.tensor([300]), text)) for z in noisy) / 2
    assert result.score == pytest.approx(expected, abs=1e-5)
    assert ours.score(image, "a red circle", timestep=300, draws=2, seed=5) == result
    assert ours.score(image, "two blue stars", timestep=300, draws=2, seed=5).score != result.score


def test_settings_tell_the_familys_guidance_where_nobody_gave_one():
    ours = model()
    unsaid, said, other = (
        ours.settings(build_config(GenerateConfig, overrides=given))
        for given in ({}, {"guidance_scale": 7.5}, {"guidance_scale": 2})
    )
    assert unsaid == said and unsaid["sample"]["guidance_scale"] == 7.5
    assert other["sample"]["guidance_scale"] == 2
    assert (
        ours.generate("a star", steps=2)[0].tobytes()
        == ours.generate("a star", steps=2, guidance_scale=7.5)[0].tobytes()
    )


def test_settings_tell_the_guided_part_where_it_is_not_the_whole_schedule():
    ours = model()
    asked = ({}, {"guidance_start": 0, "guidance_end": 1}, {"guidance_start": 0.1})
    whole, said, part = (ours.settings(build_config(GenerateConfig, overrides=how))["sample"] for how in asked)
    assert whole == said and "guidance_start" not in whole  # older images, which say nothing, still count
    assert (part["guidance_start"], part["guidance_end"]) == (0.1, 1.0)


def test_settings_leave_out_what_changes_no_image_and_keep_the_rest():
    ours = model()
    one = ours.settings(build_config(GenerateConfig, overrides={"batch_size": 1}))
    two = ours.settings(build_config(GenerateConfig, overrides={"batch_size": 8}))
    assert one == two
    for change in (
        {"steps": 3},
        {"correct": 0.5},
        {"best_of": 2},
        {"seed": 1},
        {"height": 64},
        {"negative_prompt": "x"},
        {"lora_draws": False},
    ):
        assert ours.settings(build_config(GenerateConfig, overrides=change)) != one, change


def test_other_weights_are_other_images():
    """The text encoder, the VAE, the strength of a LoRA and the precision decide an image as the denoiser does."""
    config = build_config(GenerateConfig)
    seen = [model().settings(config)]
    for change in (
        lambda ours: ours.pipeline.text_encoder.get_input_embeddings().weight.data.mul_(2),
        lambda ours: ours.pipeline.vae.decoder.conv_in.weight.data.mul_(2),
        lambda ours: ours.pipeline.to(torch.bfloat16),
        lambda ours: add_lora(ours.backbone, 2),
        lambda ours: add_lora(ours.backbone, 2, alpha=8.0),
    ):
        torch.manual_seed(0)  # of the LoRA
        ours = model()
        change(ours)
        assert ours.settings(config) not in seen
        seen.append(ours.settings(config))


def test_seeds_and_pictures_may_be_given_as_the_command_line_has_them(tmp_path):
    ours = model()
    images = ours.generate("a star", seeds="0-1", steps=1)
    assert [image.tobytes() for image in images] == [
        image.tobytes() for image in ours.generate("a star", seeds=[0, 1], steps=1)
    ]
    with pytest.raises(InputError, match="seeds `a`"):
        ours.generate("a star", seeds="a")
    images[0].save(tmp_path / "a.png")
    for given in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert ours.score(given, "a star") == ours.score(images[0], "a star")
    with pytest.raises(InputError, match="cannot read image .*missing.png"):
        ours.score(tmp_path / "missing.png", "a star")


def test_the_dtype_is_that_of_the_frozen_weights(base):
    assert dpt_t2i.load(str(base), lora="none", device="cpu", dtype="bfloat16").backbone.dtype == torch.bfloat16
    with pytest.raises(InputError, match="revision"):
        dpt_t2i.load(str(base), device="cpu", revision="main")


@pytest.mark.parametrize(
    "name, mend",
    [
        ("lora", "give it to `load`"),
        ("adapter", "give it to `load`"),
        ("dtype", "give it to `load`"),
        ("prompts_file", "give `prompts`"),
        ("output_dir", "save the pictures"),
    ],
)
def test_what_is_loads_or_the_commands_own_is_refused(name, mend):
    """A before and after in a notebook would compare the tuned model with itself."""
    with pytest.raises(InputError, match=f"`{name}` is no setting of a picture; {mend}"):
        model().generate("a star", steps=1, **{name: "none"})


def test_score_takes_one_picture_and_one_prompt():
    image = Image.new("RGB", (32, 32))
    for picture, prompt in ((image, ["a star", "two stars"]), (7, "a star"), ([image], "a star")):
        with pytest.raises(InputError, match="takes one picture, or the path of one, and one prompt"):
            model().score(picture, prompt)


def test_a_noise_level_that_does_not_exist_is_refused_before_anything_is_drawn() -> None:
    backbone, drawn = tiny_backbone(), []
    model = T2IModel(backbone, tiny_adapter(backbone))
    config = build_config(GenerateConfig, overrides={"score_timestep": 1000, "steps": 2})
    with pytest.raises(InputError, match="score_timestep 1000 is not in 0..999"):
        list(model.run(jobs_of(["a star"], [0], False), config, drawn.append))
    assert drawn == []
