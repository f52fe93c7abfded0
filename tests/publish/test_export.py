"""`dpt export`: what it writes gives stock diffusers the very image, and other programs the keys that they look for."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dpt_t2i
from dpt_t2i.adapter.io import save_adapter
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.lora import LORA_FILE, add_lora, load_lora, save_lora
from dpt_t2i.cli import main
from dpt_t2i.config import ExportConfig, build_config
from dpt_t2i.errors import InputError
from dpt_t2i.files import file_hash
from dpt_t2i.publish.export import run_export
from tests.families import FAMILIES, save_sd3
from tests.publish.pipelines import ALPHA, RANK, Family, image_of, make, stock
from tests.tiny import tiny_adapter

TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # in SD 1, 2 and XL
TO_Q_KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Family]:
    return request.param, make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make("sd1", tmp_path_factory.mktemp("models"))


def export(base: Path, lora: Path | str | None, folder: Path, kind: str, **more: Any) -> dict[str, Any]:
    asked = {"pretrained_model_name_or_path": str(base), "format": kind, "output_dir": str(folder), **more}
    return run_export(build_config(ExportConfig, None, asked | ({} if lora is None else {"lora": str(lora)})))


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def test_diffusers_to_kohya_to_diffusers_is_the_same_image(family: tuple[str, Family], tmp_path: Path) -> None:
    name, made = family
    export(made.base, made.lora, tmp_path / "one", "diffusers")
    answer = export(made.base, tmp_path / "one", tmp_path / "two", "kohya")
    kohya = tmp_path / "two" / answer["files"][0]
    export(made.base, kohya, tmp_path / "three", "diffusers")
    pipeline = stock(made.base)
    images = {}
    for file in (tmp_path / "one" / LORA_FILE, kohya, tmp_path / "three" / LORA_FILE):
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        images[file] = image_of(pipeline)
        pipeline.unload_lora_weights()
    assert (answer["rank"], answer["alpha"]) == ([RANK], [ALPHA])
    for file, image in images.items():
        np.testing.assert_allclose(image, made.image, atol=1e-5, err_msg=str(file))
    np.testing.assert_allclose(image_of(pipeline), made.plain, atol=1e-5)
    assert np.abs(made.image - made.plain).max() > 1e-2
    without_alpha = {key: one for key, one in load_file(kohya).items() if not key.endswith(".alpha")}
    pipeline.load_lora_weights(without_alpha)  # the bar above sees a lost alpha
    assert np.abs(image_of(pipeline) - made.image).max() > 1e-3


def test_the_kohya_file_has_the_keys_and_headers_that_comfyui_and_a1111_look_for(
    family: tuple[str, Family], tmp_path: Path
) -> None:
    name, made = family
    answer = export(made.base, made.lora, tmp_path, "kohya", title="My LoRA", license="mit")
    assert answer["files"] == ["My-LoRA.safetensors", "README.md"]
    file = tmp_path / "My-LoRA.safetensors"
    tensors, header = load_file(file), header_of(file)
    source = load_file(made.lora / LORA_FILE)
    assert {key.split(".", 1)[1] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert len(tensors) == 3 * answer["layers"] == 3 * len(source) // 2
    assert torch.equal(tensors[f"{TO_Q_KOHYA}.lora_down.weight"], source[f"unet.{TO_Q}.lora_A.weight"])
    assert torch.equal(tensors[f"{TO_Q_KOHYA}.lora_up.weight"], source[f"unet.{TO_Q}.lora_B.weight"])
    assert tensors[f"{TO_Q_KOHYA}.alpha"].shape == () and tensors[f"{TO_Q_KOHYA}.alpha"] == ALPHA != RANK
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.alpha" in tensors
    architecture, version, prediction = {
        "sd1": ("stable-diffusion-v1", "sd_v1", "epsilon"),
        "sd2": ("stable-diffusion-v2-768-v", "sd_v2_v", "v"),
        "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "epsilon"),
    }[name]
    raw = file.read_bytes()
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.title": "My LoRA",
        "modelspec.resolution": "32x32",
        "modelspec.prediction_type": prediction,
        "modelspec.license": "mit",
        "modelspec.usage_hint": "weight 1.0, no trigger word",
        "modelspec.hash_sha256": f"0x{digest}",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "7.0",
        "ss_base_model_version": version,
        "ss_v2": str(name == "sd2"),
    }
    assert {key: header.get(key) for key in expected} == expected
    assert header["modelspec.date"][:2] == "20"


def tuned(made: Family, folder: Path) -> Path:
    """A run folder of our own: LoRA with header, adapter beside it, both full of paths."""
    backbone = load_backbone(made.base, device="cpu")
    load_lora(backbone, made.lora)
    config = {
        "model": {"pretrained_model_name_or_path": "/home/secret/base", "tap": "up1"},
        "lora": {"rank": 4},
        "data": {"dataset": "/data/secret/pictures", "resolution": None},
        "train": {"learning_rate": 1e-4, "max_train_steps": 40, "train_batch_size": 8, "mixed_precision": "no"},
        "output_dir": "~/secret/run",
        "seed": 5,
    }
    save_lora(backbone, folder, config)
    fingerprint = {**backbone.fingerprint(), "lora": None}
    correction = {"correct": 0.02, "correction_rule": "relative"}
    save_adapter(
        tiny_adapter(backbone),
        folder / "adapter",
        base_fingerprint=fingerprint,
        metadata={"config": config, "correction": correction},
    )
    return folder


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_a_run_is_exported_with_its_adapter_and_without_a_private_path(sd1: Family, tmp_path: Path, kind: str) -> None:
    run = tuned(sd1, tmp_path / "run")
    answer = export(sd1.base, run, tmp_path / "out", kind)
    assert answer["files"][1:] == ["adapter/model.safetensors", "adapter/config.json", "README.md"]
    by_run = export(sd1.base, run, tmp_path / "by_run", kind, adapter=str(run))
    assert by_run["files"] == answer["files"]
    everything = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert b"secret" not in everything and str(tmp_path).encode() not in everything
    header = header_of(tmp_path / "out" / answer["files"][0])
    if kind == "kohya":
        assert len([key for key in header if key.startswith("ss_")]) >= 12
        assert (header["ss_seed"], header["ss_learning_rate"], header["ss_max_train_steps"]) == ("5", "0.0001", "40")
    else:
        assert json.loads(header["lora_adapter_metadata"])["unet.lora_alpha"] == ALPHA
        assert json.loads(header["dpt"])["base"] == json.loads(header_of(run / LORA_FILE)["dpt"])["base"]
    model = dpt_t2i.load(str(sd1.base), str(tmp_path / "out" / answer["files"][0]), device="cpu")
    assert model.adapter is not None  # found beside the LoRA
    np.testing.assert_allclose(image_of(model.pipeline), sd1.image, atol=1e-5)


def test_merged_is_a_stock_model_and_holds_the_adapter_for_it(
    sd1: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answer = export(sd1.base, tuned(sd1, tmp_path / "run"), tmp_path / "out", "merged")
    there = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert set(answer["files"]) == there and len(answer["files"]) == len(there)
    np.testing.assert_allclose(image_of(stock(tmp_path / "out")), sd1.image, atol=1e-5)
    caplog.clear()
    model = dpt_t2i.load(str(tmp_path / "out"), device="cpu")
    assert model.adapter is not None and model.adapter.origin is not None
    assert model.adapter.origin.base["name"] == "out" and model.adapter.origin.metadata["correction"]["correct"] == 0.02
    assert not [record for record in caplog.records if record.name.startswith("dpt_t2i")]
    with pytest.raises(InputError, match="out is not empty"):
        export(sd1.base, sd1.lora, tmp_path / "out", "merged")
    assert not list(tmp_path.glob("*.partial"))


def test_merged_is_sampled_as_its_base_and_is_of_one_dtype(tmp_path: Path) -> None:
    base = make("sd1", tmp_path).base
    (base / "dpt").mkdir()
    (base / "dpt" / "sampling.json").write_text('{"guidance_scale": 2.5, "eta": 1.0}')
    pipeline = stock(base)
    pipeline.text_encoder.to(torch.float16).save_pretrained(base / "text_encoder")  # as T5 is stored, mostly
    export(base, tmp_path / "lora", tmp_path / "out", "merged")
    merged = load_backbone(tmp_path / "out", device="cpu")
    assert (merged.guidance_scale, merged.eta) == (2.5, 1.0)
    assert {value.dtype for value in load_file(tmp_path / "out" / "text_encoder" / "model.safetensors").values()} == {
        torch.float32
    }
    assert np.isfinite(image_of(stock(tmp_path / "out"))).all(), "the card's two lines"


def test_merged_sdxl(tmp_path: Path) -> None:
    made = make("sdxl", tmp_path)
    export(made.base, made.lora, tmp_path / "out", "merged")
    # (W + BA) x and W x + B (A x) round differently: 1.7e-5 was seen
    np.testing.assert_allclose(image_of(stock(tmp_path / "out")), made.image, atol=5e-5)


def test_merged_sd3_without_its_t5(tmp_path: Path) -> None:
    base = save_sd3(tmp_path / "base", with_t5=False)
    backbone = load_backbone(base, device="cpu")
    add_lora(backbone, RANK, ALPHA)
    save_lora(backbone, tmp_path / "lora", {})
    export(base, tmp_path / "lora", tmp_path / "out", "merged")
    assert load_backbone(tmp_path / "out", device="cpu").pipeline.text_encoder_3 is None


def test_merged_where_the_checker_was_deleted(sd1: Family, tmp_path: Path) -> None:
    """Its folder is gone and the index still names it: what draws such a base also writes it out."""
    shutil.copytree(sd1.base, tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    export(tmp_path / "base", sd1.lora, tmp_path / "out", "merged")
    assert load_backbone(tmp_path / "out", device="cpu").pipeline.safety_checker is None


def test_a_caption_encoder_elsewhere_is_named_without_its_folder(sd1: Family, tmp_path: Path) -> None:
    run = tuned(sd1, tmp_path / "run")
    card = json.loads((run / "adapter" / "config.json").read_text())
    for told, published in (("/home/someone/roberta", "roberta"), ("./grounding_text", "./grounding_text")):
        card["adapter"]["grounding_text"] = told
        (run / "adapter" / "config.json").write_text(json.dumps(card))
        export(sd1.base, run, tmp_path / "out", "diffusers")
        written = json.loads((tmp_path / "out" / "adapter" / "config.json").read_text())
        assert written["adapter"]["grounding_text"] == published


def tuned_dit(name: str, folder: Path) -> tuple[Path, Any]:
    """Base of a DiT family, `lora` beside it (alpha other than rank), and the pipeline in which the two are one."""
    backbone = load_backbone(FAMILIES[name](folder / "base"), device="cpu")
    for number, parameter in enumerate(add_lora(backbone, RANK, ALPHA)):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    save_lora(backbone, folder / "lora", {})
    return folder / "base", backbone.pipeline


def test_sd3_loads_in_stock_diffusers(tmp_path: Path) -> None:
    base, ours = tuned_dit("sd3", tmp_path)
    answer = export(base, tmp_path / "lora", tmp_path / "out", "diffusers")
    assert (answer["rank"], answer["alpha"]) == ([RANK], [RANK]), "alpha is inside the weights"
    pipeline = StableDiffusion3Pipeline.from_pretrained(base, image_encoder=None, feature_extractor=None)
    plain = image_of(pipeline)
    pipeline.load_lora_weights(tmp_path / "out")
    np.testing.assert_allclose(image_of(pipeline), image_of(ours), atol=1e-5)
    assert np.abs(image_of(pipeline) - plain).max() > 1e-2
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(load_file(tmp_path / "out" / LORA_FILE))  # as ComfyUI does, who reads no header
    np.testing.assert_allclose(image_of(pipeline), image_of(ours), atol=1e-5)
    with pytest.raises(InputError, match="kohya is for U-Nets"):
        export(base, tmp_path / "lora", tmp_path / "kohya", "kohya")


@pytest.mark.parametrize("name, options", [("pixart_sigma", {"use_resolution_binning": False}), ("sd3", {})])
def test_a_merged_dit_needs_no_lora(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, ours = tuned_dit(name, tmp_path)
    export(base, tmp_path / "lora", tmp_path / "out", "merged")
    merged = load_backbone(tmp_path / "out", device="cpu")
    assert not any(".lora_" in name for name, _ in merged.denoiser.named_parameters())
    # (W + BA) x and W x + B (A x) round differently
    wanted = image_of(ours, **options)
    np.testing.assert_allclose(image_of(merged.pipeline, **options), wanted, atol=5e-5)
    plain = load_backbone(base, device="cpu").pipeline
    assert np.abs(image_of(plain, **options) - wanted).max() > 1e-2


@pytest.mark.parametrize("name, width", [("flux", 32), ("pixart_sigma", 16)])
def test_dit_keys_are_diffusers_and_kohya_is_refused(tmp_path: Path, name: str, width: int) -> None:
    FAMILIES[name](tmp_path / "base")
    module = "transformer_blocks.0.attn.to_q" if name == "flux" else "transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(2, width), torch.randn(width, 2)
    tensors = {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
    described = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 5})
    save_file(tensors, tmp_path / "source.safetensors", metadata={"lora_adapter_metadata": described})
    export(tmp_path / "base", tmp_path / "source.safetensors", tmp_path / "out", "diffusers")
    written = load_file(tmp_path / "out" / LORA_FILE)
    inside = {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up * 5 / 2}
    assert written.keys() == inside.keys() and all(torch.equal(written[key], inside[key]) for key in inside)
    assert json.loads(header_of(tmp_path / "out" / LORA_FILE)["lora_adapter_metadata"])["transformer.lora_alpha"] == 2
    with pytest.raises(InputError, match="kohya is for U-Nets.*fuse q, k and v.*--format diffusers"):
        export(tmp_path / "base", tmp_path / "source.safetensors", tmp_path / "kohya", "kohya")
    assert not (tmp_path / "kohya").exists()


def test_a_lora_of_another_family_or_prediction_type_is_one_line(sd1: Family, tmp_path: Path) -> None:
    FAMILIES["flux"](tmp_path / "flux")
    with pytest.raises(InputError, match="key `unet..*is unknown to `flux`; is it a LoRA of this family?"):
        export(tmp_path / "flux", sd1.lora, tmp_path / "out", "diffusers")
    other = make("sd2", tmp_path / "two")
    with pytest.raises(InputError, match="prediction_type epsilon.*prediction_type v_prediction"):
        export(other.base, tuned(sd1, tmp_path / "run"), tmp_path / "out", "kohya")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_one_line(sd1: Family, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`base` ships none; give --lora"):
        export(sd1.base, None, tmp_path / "out", "diffusers")
    with pytest.raises(InputError, match="is the LoRA to export itself"):
        export(sd1.base, sd1.lora, sd1.lora, "diffusers")
    (tmp_path / "cut.safetensors").write_bytes((sd1.lora / LORA_FILE).read_bytes()[:-10])
    with pytest.raises(InputError, match="cut.safetensors is truncated"):
        export(sd1.base, tmp_path / "cut.safetensors", tmp_path / "out", "kohya")
    with pytest.raises(InputError, match="no adapter folder"):
        export(sd1.base, sd1.lora, tmp_path / "out", "diffusers", adapter=str(tmp_path))
    with pytest.raises(InputError, match="cannot read .*nothing.json"):
        export(sd1.base, sd1.lora, tmp_path / "out", "diffusers", itm=str(tmp_path / "nothing.json"))
    (tmp_path / "other.json").write_text('{"tuned": {}}')
    for kind, lacks in (("alignment", "arms"), ("itm", "examples"), ("rec", "examples")):
        with pytest.raises(InputError, match=f"other.json is no result of `dpt evaluate {kind}`: it has no `{lacks}`"):
            export(sd1.base, sd1.lora, tmp_path / "out", "diffusers", **{kind: str(tmp_path / "other.json")})
    (tmp_path / "rec.json").write_text('{"examples": 3, "timesteps": {}, "oracle": {}}')
    with pytest.raises(
        InputError, match="no result of `dpt evaluate itm`, but of `dpt evaluate rec`; give it as --rec"
    ):
        export(sd1.base, sd1.lora, tmp_path / "out", "diffusers", itm=str(tmp_path / "rec.json"))
    (tmp_path / "itm.json").write_text('{"examples": 3, "timesteps": {}}')
    with pytest.raises(InputError, match="no result of `dpt evaluate rec`: it has no `oracle`"):
        export(sd1.base, sd1.lora, tmp_path / "out", "diffusers", rec=str(tmp_path / "itm.json"))
    with pytest.raises(InputError, match="dtype float16 is for --format merged"):
        export(sd1.base, sd1.lora, tmp_path / "out", "diffusers", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_the_command(sd1: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--pretrained_model_name_or_path", str(sd1.base), "--output_dir", str(tmp_path / "out")]
    assert main(["export", "--format", "kohya", "--lora", str(sd1.lora), *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0] == "base-dpt.safetensors"
    assert main(["export", "--format", "onnx", *where]) == 2
    assert "onnx" in capsys.readouterr().err


def test_a_foreign_lora_gets_a_card_that_claims_nothing(sd1: Family, tmp_path: Path) -> None:
    export(sd1.base, sd1.lora, tmp_path, "diffusers")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "does not say how it was trained" in text and "--correct" not in text and "## Training" not in text
    assert 'base = "path/to/base"' in text and "--format kohya" in text


def test_a_readme_of_the_users_is_not_replaced(sd1: Family, tmp_path: Path) -> None:
    for _ in range(2):  # a card of ours is
        export(sd1.base, sd1.lora, tmp_path, "diffusers")
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(InputError, match="README.md is none of our cards and would be replaced; move it"):
        export(sd1.base, sd1.lora, tmp_path, "kohya")
    assert (tmp_path / "README.md").read_text() == "my project" and not list(tmp_path.glob("base*"))


def test_ranks_and_alphas_that_differ_between_layers_survive(sd1: Family, tmp_path: Path) -> None:
    backbone = load_backbone(sd1.base, device="cpu")
    add_lora(backbone, 2)
    mid = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
    tensors = {}
    for name, rank, alpha in ((TO_Q, 2, 3.0), (mid, 4, 1.0), (TO_Q.replace("attn1.to_q", "attn1.to_k"), 2, 3.0)):
        out, wide = backbone.denoiser.get_submodule(name).weight.shape
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, wide)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, rank)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "mixed.safetensors")
    export(sd1.base, tmp_path / "mixed.safetensors", tmp_path / "one", "diffusers")
    answer = export(sd1.base, tmp_path / "one", tmp_path / "two", "kohya")
    again = load_file(tmp_path / "two" / answer["files"][0])
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert header_of(tmp_path / "two" / answer["files"][0])["ss_network_dim"] == "Dynamic"


def test_another_lora_is_not_mixed_into_an_export(sd1: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(sd1.base, sd1.lora, out, "diffusers")
    export(sd1.base, sd1.lora, out, "diffusers", license="mit")  # the same once more
    export(sd1.base, sd1.lora, out, "kohya", title="one")  # and in another format
    other = tmp_path / "other.safetensors"
    moved = {key: value + 0.1 for key, value in load_file(out / LORA_FILE).items()}
    save_file(moved, other, header_of(out / LORA_FILE))
    before = (out / LORA_FILE).read_bytes()
    for kind in ("diffusers", "kohya"):
        with pytest.raises(InputError, match=f"{LORA_FILE} is not the LoRA to export; give another --output_dir"):
            export(sd1.base, other, out, kind)
    assert (out / LORA_FILE).read_bytes() == before
    shared = tmp_path / "loras"  # of a program that keeps them all in one folder
    shared.mkdir()
    save_file({"x": torch.zeros(1)}, shared / "x.safetensors")
    export(sd1.base, sd1.lora, shared, "kohya", title="mine")
    for lora, title in ((other, "mine"), (sd1.lora, "x")):
        with pytest.raises(InputError, match=f"{title}.safetensors is not the LoRA to export; .* or --title"):
            export(sd1.base, lora, shared, "kohya", title=title)


def test_figures_of_another_adapter_are_no_part_of_a_card(
    sd1: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tuned(sd1, tmp_path / "run")
    weights = {"lora": file_hash(run / LORA_FILE), "adapter": file_hash(run / "adapter" / "model.safetensors")}
    file = tmp_path / "itm.json"
    file.write_text(json.dumps({"examples": 3, "timesteps": {}, "weights": weights}))
    export(sd1.base, run, tmp_path / "out", "diffusers", itm=str(file))
    assert "another" not in caplog.text
    export(sd1.base, tmp_path / "out", tmp_path / "again", "diffusers", itm=str(file))  # the same LoRA, another header
    assert "given as --itm are of another lora file than is exported" in caplog.text
    file.write_text(json.dumps({"examples": 3, "timesteps": {}, "weights": weights | {"adapter": "0" * 16}}))
    with pytest.raises(InputError, match=r"given as --itm are of another adapter file than is exported \(0000"):
        export(sd1.base, run, tmp_path / "third", "diffusers", itm=str(file))
    assert not (tmp_path / "third").exists()


def test_where_half_the_size_would_do_a_merged_model_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make("sd1", tmp_path).base
    with caplog.at_level("INFO", "dpt_t2i"):
        export(base, tmp_path / "lora", tmp_path / "one", "merged")
        assert "halves the model" not in caplog.text
        stock(base).unet.to(torch.bfloat16).save_pretrained(base / "unet")
        stock(base).unet.to(torch.float16).save_pretrained(base / "unet", variant="fp16")  # which is not what is loaded
        export(base, tmp_path / "lora", tmp_path / "two", "merged")
        assert "the base's files are bfloat16: --dtype bfloat16 halves the model" in caplog.text
    weights = load_file(tmp_path / "two" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
