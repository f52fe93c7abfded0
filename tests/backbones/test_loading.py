import json
import logging
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch

from dpt_t2i.backbones.fingerprint import weights_hash
from dpt_t2i.backbones.loading import (
    FAMILIES,
    backbone_of,
    choose_artifacts,
    load_backbone,
    resolve_device,
    shipped_artifacts,
)
from dpt_t2i.backbones.lora import LORA_FILE
from dpt_t2i.errors import InputError
from tests.families import save_pixart_sigma
from tests.tiny import tiny_backbone, tiny_pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "my-base"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_saved_pipeline_comes_back_the_same(saved, caplog, capfd):
    backbone = load_backbone(saved, device="cpu")
    assert backbone.name == "my-base"
    fresh = tiny_backbone()
    assert backbone.fingerprint()["weights"] == fresh.fingerprint()["weights"]
    assert torch.equal(backbone.encode_text(["a red circle"]).tokens, fresh.encode_text(["a red circle"]).tokens)
    assert backbone.token_offsets(["a star"]) == fresh.token_offsets(["a star"])
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_dtype_is_that_of_all_frozen_weights(saved):
    backbone = load_backbone(saved, device="cpu", dtype="bfloat16")
    parts = (backbone.denoiser, backbone.pipeline.vae, backbone.pipeline.text_encoder)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.bfloat16}


def test_the_guidance_of_a_family_is_its_stock_pipelines():
    ours = {family: backbone.guidance_scale for family, (backbone, _) in FAMILIES.items()}
    stock = {family: signature(getattr(diffusers, family).__call__).parameters["guidance_scale"] for family in FAMILIES}
    assert ours == {family: parameter.default for family, parameter in stock.items()}
    assert ours["StableDiffusionPipeline"] == 7.5 and ours["FluxPipeline"] == 3.5


def test_a_base_may_publish_how_it_is_sampled_best(folder):
    assert (load_backbone(folder, device="cpu").guidance_scale, load_backbone(folder, device="cpu").eta) == (7.5, 0.0)
    file = folder / "dpt" / "sampling.json"
    file.parent.mkdir()
    file.write_text('{"guidance_scale": 4.0, "eta": 1.0}')
    backbone = load_backbone(folder, device="cpu")
    assert (backbone.guidance_scale, backbone.eta) == (4.0, 1.0)
    assert backbone.guidance_interval == (0.0, 1.0)
    file.write_text('{"guidance_start": 0.1, "guidance_end": 0.9}')
    assert load_backbone(folder, device="cpu").guidance_interval == (0.1, 0.9)
    file.write_text('{"eta": 0.5}')
    backbone = load_backbone(folder, device="cpu")
    assert (backbone.guidance_scale, backbone.eta) == (7.5, 0.5)
    for broken, said in (('{"eta": 2}', "eta"), ('{"cfg": 4}', "unknown config key `cfg`"), ("{", "not valid YAML")):
        file.write_text(broken)
        with pytest.raises(InputError, match="sampling.json: .*" + said):
            load_backbone(folder, device="cpu")


@pytest.mark.parametrize("name", ["no-such-model", "./runs/none", "/no/such/folder"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(InputError, match=f"base model {name} does not exist"):
        load_backbone(name)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(InputError, match="model_index.json"):
        load_backbone(tmp_path)


def test_an_unknown_family_lists_the_supported_ones(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "KolorsPipeline"}))
    with pytest.raises(InputError, match="KolorsPipeline is not supported; supported: StableDiffusionPipeline"):
        load_backbone(folder)


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    expected = "merges.txt|vocab.json" if "tokenizer" in file else file.split("/")[0]
    with pytest.raises(InputError, match=expected):
        load_backbone(folder, device="cpu")


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_truncated_file_is_named(folder, file):
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{file} is truncated"):
        load_backbone(folder, device="cpu")


def test_what_ships_with_a_base(folder):
    assert shipped_artifacts(folder) == (None, None)
    probe, tuned = folder / "dpt" / "probe" / "adapter", folder / "dpt" / "tuned"
    probe.mkdir(parents=True)
    assert shipped_artifacts(folder) == (None, probe)
    (tuned / "adapter").mkdir(parents=True)
    assert shipped_artifacts(folder) == (None, probe)  # an adapter of a LoRA that is not there
    (tuned / LORA_FILE).touch()
    assert shipped_artifacts(folder) == (tuned / LORA_FILE, tuned / "adapter")
    assert shipped_artifacts(folder, with_lora=False) == (None, probe)


def test_settings_choose_artifacts(folder, tmp_path):
    probe, tuned = folder / "dpt" / "probe" / "adapter", folder / "dpt" / "tuned"
    for adapter in (probe, tuned / "adapter", tmp_path / "run" / "adapter"):
        adapter.mkdir(parents=True)
    (tuned / LORA_FILE).touch()
    run = str(tmp_path / "run")
    assert choose_artifacts(folder, None, None) == (tuned / LORA_FILE, tuned / "adapter")
    assert choose_artifacts(folder, "none", None) == (None, probe)
    assert choose_artifacts(folder, "none", "none") == (None, None)
    assert choose_artifacts(folder, None, "none") == (tuned / LORA_FILE, None)
    assert choose_artifacts(folder, run, None) == (Path(run), Path(run) / "adapter")
    assert choose_artifacts(folder, f"{run}/{LORA_FILE}", None) == (Path(run) / LORA_FILE, Path(run) / "adapter")
    assert choose_artifacts(folder, str(tmp_path / "bare"), None)[1] is None
    assert choose_artifacts(folder, run, "other") == (Path(run), Path("other"))


def test_the_revision_reaches_what_ships_and_what_is_fetched(folder, monkeypatch):
    asked = []

    def download(name, **how):
        asked.append((name, how["revision"], how.get("allow_patterns")))
        return str(folder)

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (folder / "dpt" / "probe" / "adapter").mkdir(parents=True)
    assert choose_artifacts("someone/model", None, None, "v2") == (None, folder / "dpt" / "probe" / "adapter")
    assert asked == [("someone/model", "v2", None), ("someone/model", "v2", "dpt/*")]


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match="`gpu` is unknown"):
        resolve_device("gpu")
    with pytest.raises(InputError, match="`cuda:99` is not here"):
        resolve_device("cuda:99")


def test_loading_restores_the_libraries_own_voice(saved):
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.WARNING)
    transformers_logging.enable_progress_bar()
    load_backbone(saved, device="cpu")
    assert transformers_logging.get_verbosity() == logging.WARNING
    assert transformers_logging.is_progress_bar_enabled()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_half_precision_files_alone_is_read_by_their_variant(tmp_path, sharded):
    size = {"max_shard_size": "100KB"} if sharded else {}
    tiny_pipeline().save_pretrained(tmp_path / "fp16", variant="fp16", **size)
    weights = [file.name for file in (tmp_path / "fp16" / "unet").glob("*.safetensors")]
    assert all(".fp16" in name for name in weights) and (len(weights) > 1) == sharded
    assert load_backbone(tmp_path / "fp16", device="cpu").fingerprint()["weights"] == weights_hash(tiny_pipeline().unet)


def test_what_a_library_keeps_in_float32_stays_there(tmp_path):
    """T5 overflows float16 behind its `wo`: transformers knows, where it is told the dtype while it loads."""
    backbone = load_backbone(save_pixart_sigma(tmp_path / "base"), device="cpu", dtype="float16")
    encoder = backbone.pipeline.text_encoder
    kept = {name: value.dtype for name, value in encoder.named_parameters() if value.dtype != torch.float16}
    assert kept and set(kept.values()) == {torch.float32} and all(".wo." in name for name in kept)
    assert {value.dtype for value in backbone.denoiser.parameters()} == {torch.float16}


def test_a_repository_of_half_precision_files_alone_is_fetched_by_their_variant(tmp_path, monkeypatch):
    """Without a variant diffusers fetches such a one's configs and no weights."""
    asked = []

    def download(name, revision, variant=None):
        asked.append((name, revision, variant))
        folder = tmp_path / str(variant)
        tiny_pipeline().save_pretrained(folder, variant=variant)
        for file in folder.rglob("*.safetensors") if variant is None else ():
            file.unlink()
        return str(folder)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: None)
    backbone = load_backbone("someone/half", revision="v2", device="cpu")
    assert asked == [("someone/half", "v2", None), ("someone/half", "v2", "fp16")]
    assert backbone.fingerprint()["weights"] == weights_hash(tiny_pipeline().unet)


def test_loading_in_a_fresh_process_says_nothing(saved):
    code = f"from dpt_t2i.backbones.loading import load_backbone; load_backbone({str(saved)!r}, device='cpu')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_checkpoint_of_one_file_says_how_it_becomes_a_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"is one file; .*from_single_file\(.*model.safetensors.*save_pretrained"):
        load_backbone(tmp_path / "model.safetensors")


def test_a_pointer_in_the_place_of_a_variant_that_is_not_read_is_no_fault(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_text("version https://git-lfs")
    assert load_backbone(tmp_path, device="cpu").denoiser is not None
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_text("version https://git-lfs")
    with pytest.raises(InputError, match="diffusion_pytorch_model.safetensors is a pointer of git-lfs"):
        load_backbone(tmp_path, device="cpu")


def test_the_dtype_is_that_in_which_packed_weights_are_used():
    """bitsandbytes keeps the first weight of FLUX as bytes."""
    backbone = tiny_backbone()
    first = backbone.denoiser.conv_in
    first.weight = torch.nn.Parameter(first.weight.to(torch.uint8), requires_grad=False)
    assert next(backbone.denoiser.parameters()).dtype == torch.uint8 and backbone.dtype == torch.float32


def change_unet(folder: Path, **entries: object) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_denoiser_without_a_size_of_its_own_takes_the_pipelines(folder):
    change_unet(folder, sample_size=None)
    scale = load_backbone(folder, device="cpu").vae_scale
    assert load_backbone(folder, device="cpu").image_size == (128 * scale, 128 * scale)


def test_a_denoiser_distilled_with_guidance_is_refused(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet = diffusers.UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=8)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"distilled with the guidance scale as an input \(LCM, `time_cond_proj_dim`\)"
    ):
        load_backbone(tmp_path, device="cpu")


def test_a_denoiser_of_more_channels_than_the_vae_gives_is_refused_from_a_folder_too(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet = diffusers.UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=9)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="takes 9 channels and the VAE gives 4: .* cannot be judged by latents alone"):
        load_backbone(tmp_path, device="cpu")


def test_a_vae_without_a_posterior_is_refused():
    pipeline = tiny_pipeline()
    pipeline.vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    with pytest.raises(InputError, match="is a AutoencoderTiny, which gives no posterior"):
        backbone_of(pipeline)


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "is empty"), (b"version https://git-lfs.github", "pointer of git-lfs")]
)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_that_are_not_there_are_named(folder, content, says, suffix):
    weights = folder / "text_encoder" / "model.safetensors"
    weights.unlink()
    name = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (folder / "text_encoder" / name).write_bytes(content)
    with pytest.raises(InputError, match=f"text_encoder.*{name} .*{says}.*; fetch it again"):
        load_backbone(folder, device="cpu")


def test_a_damaged_pickle_of_weights_is_one_line(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"\x80\x02nothing")
    with pytest.raises(InputError, match="damaged file of weights; fetch it again|does not load"):
        load_backbone(folder, device="cpu")


def test_an_unknown_dtype_names_the_known_ones(saved):
    with pytest.raises(InputError, match="dtype `bf16` is unknown; give float32, bfloat16, float16"):
        load_backbone(saved, device="cpu", dtype="bf16")
