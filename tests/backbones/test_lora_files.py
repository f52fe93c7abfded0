"""One LoRA in every naming that users have; names are written out by hand here."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from dpt_t2i.backbones.lora_files import LoraFile, read_lora
from dpt_t2i.errors import InputError

PATH = "mid_block.attentions.0.transformer_blocks.0.attn1."
DOWN, UP = torch.arange(12.0).view(2, 6), torch.arange(10.0).view(5, 2)


def attention() -> nn.Module:
    """A denoiser with one attention, whose every projection takes 6 and gives 5."""
    attn1 = nn.ModuleDict({"to_q": nn.Linear(6, 5), "to_out": nn.ModuleList([nn.Linear(6, 5)])})
    block = nn.ModuleDict({"transformer_blocks": nn.ModuleList([nn.ModuleDict({"attn1": attn1})])})
    return nn.ModuleDict({"mid_block": nn.ModuleDict({"attentions": nn.ModuleList([block])})})


def read(folder: Path, tensors: dict[str, Tensor], header: dict[str, object] | None = None, convert=None) -> LoraFile:
    metadata = None if header is None else {"lora_adapter_metadata": json.dumps(header)}
    save_file({key: one.clone() for key, one in tensors.items()}, folder / "x.safetensors", metadata=metadata)
    return read_lora(folder / "x.safetensors", {"unet": attention()}, "tiny", convert)


@pytest.mark.parametrize(
    ("down", "up", "module"),
    [
        (f"unet.{PATH}to_q.lora.down.weight", f"unet.{PATH}to_q.lora.up.weight", "to_q"),
        (f"unet.{PATH}to_q.lora_A.weight", f"unet.{PATH}to_q.lora_B.weight", "to_q"),
        (f"unet.{PATH}to_q.lora_A.default.weight", f"unet.{PATH}to_q.lora_B.default.weight", "to_q"),
        (f"base_model.model.{PATH}to_q.lora_A.weight", f"base_model.model.{PATH}to_q.lora_B.weight", "to_q"),
        (f"unet.{PATH}processor.to_q_lora.down.weight", f"unet.{PATH}processor.to_q_lora.up.weight", "to_q"),
        (f"unet.{PATH}processor.to_out_lora.down.weight", f"unet.{PATH}processor.to_out_lora.up.weight", "to_out.0"),
        (
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
            "to_out.0",
        ),
        (
            "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
            "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_up.weight",
            "to_q",
        ),
    ],
)
def test_every_naming_is_read(tmp_path, down, up, module):
    layers = read(tmp_path, {down: DOWN, up: UP}).layers
    assert list(layers) == [f"unet.{PATH}{module}"]
    layer = layers[f"unet.{PATH}{module}"]
    assert torch.equal(layer.down, DOWN) and torch.equal(layer.up, UP)
    assert (layer.rank, layer.alpha) == (2, 2.0)  # none told: the rank


def pair(module: str = "to_q") -> dict[str, Tensor]:
    return {f"unet.{PATH}{module}.lora.down.weight": DOWN, f"unet.{PATH}{module}.lora.up.weight": UP}


@pytest.mark.parametrize(
    ("header", "alpha"),
    [
        ({"unet.r": 2, "unet.lora_alpha": 5}, 5.0),
        ({"unet.r": 2, "unet.lora_alpha": 5, "unet.alpha_pattern": {"attn1.to_q": 7}}, 7.0),
        ({"unet.r": 2, "unet.lora_alpha": 5, "unet.alpha_pattern": {f"^{PATH}to_q": 7}}, 7.0),
        ({"unet.r": 2, "unet.lora_alpha": 5, "unet.alpha_pattern": {"to_k": 7}}, 5.0),
        ({"unet.r": 9, "unet.lora_alpha": 5, "unet.rank_pattern": {"to_q": 2}}, 5.0),
        ({"unet.r": 2, "unet.lora_alpha": 5, "unet.use_rslora": True}, 5 * math.sqrt(2)),  # 5 / sqrt(2) = alpha / 2
        ({"text_encoder.r": 8, "text_encoder.lora_alpha": 9}, 2.0),
    ],
)
def test_alpha_comes_from_diffusers_header(tmp_path, header, alpha):
    assert read(tmp_path, pair(), header).layers[f"unet.{PATH}to_q"].alpha == pytest.approx(alpha)


def test_alpha_in_the_file_is_the_layers_own(tmp_path):
    tensors = pair() | pair("to_out.0") | {f"unet.{PATH}to_q.alpha": torch.tensor(0.5)}
    layers = read(tmp_path, tensors).layers
    assert {name.removeprefix(f"unet.{PATH}"): one.alpha for name, one in layers.items()} == {
        "to_q": 0.5,
        "to_out.0": 2,
    }


@pytest.mark.parametrize(
    ("original", "module"),
    [
        # published SDXL LoRAs: input_blocks 4 and 5 are level 1, 7 and 8 level 2; output_blocks 0-2 and 3-5 two levels
        (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("input_blocks_5_1_proj_in", "down_blocks.1.attentions.1.proj_in"),
        (
            "input_blocks_8_1_transformer_blocks_1_attn2_to_k",
            "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k",
        ),
        ("middle_block_1_transformer_blocks_0_attn2_to_v", "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"),
        ("output_blocks_2_1_transformer_blocks_0_ff_net_2", "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.2"),
        (
            "output_blocks_3_1_transformer_blocks_0_attn1_to_q",
            "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
    ],
)
def test_sdxl_files_in_the_original_codes_names(tmp_path, original, module):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=[1, 1, 2],
            cross_attention_dim=12,
            attention_head_dim=2,
            use_linear_projection=True,
            norm_num_groups=4,
        )
    out, wide = unet.get_submodule(module).weight.shape
    stem = f"lora_unet_{original}"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, wide), f"{stem}.lora_up.weight": torch.ones(out, 2)}
    save_file(tensors, tmp_path / "xl.safetensors")
    assert list(read_lora(tmp_path / "xl.safetensors", {"unet": unet}, "xl").layers) == [f"unet.{module}"]


def test_a_convolution_keeps_its_four_dimensions(tmp_path):
    root = nn.ModuleDict({"proj_in": nn.Conv2d(3, 4, 1)})
    down, up = torch.ones(2, 3, 1, 1), torch.ones(4, 2, 1, 1)
    tensors = {"lora_unet_proj_in.lora_down.weight": down, "lora_unet_proj_in.lora_up.weight": up}
    save_file(tensors, tmp_path / "conv.safetensors")
    layer = read_lora(tmp_path / "conv.safetensors", {"unet": root}, "tiny").layers["unet.proj_in"]
    assert layer.down.shape == (2, 3, 1, 1) and layer.up.shape == (4, 2, 1, 1)


def test_names_that_only_diffusers_knows_are_asked_of_it(tmp_path):
    seen = []

    def convert(tensors):
        seen.append(sorted(tensors))
        return pair()

    strange = {"diffusion_model.x.lora_A.weight": DOWN, "diffusion_model.x.lora_B.weight": UP}
    assert list(read(tmp_path, strange, convert=convert).layers) == [f"unet.{PATH}to_q"]
    assert seen == [sorted(strange)]
    read(tmp_path, pair(), convert=convert)
    assert len(seen) == 1  # where every name is known, nobody is asked

    def fail(tensors):
        raise KeyError("img_attn")

    with pytest.raises(InputError, match="its keys are unknown to `tiny`.*img_attn"):
        read(tmp_path, strange, convert=fail)


@pytest.mark.parametrize("key", [f"unet.{PATH}to_q.dora_scale", "lora_unet_x.dora_scale"])
def test_a_dora_is_refused_before_a_converter_may_drop_its_magnitudes(tmp_path, key):
    with pytest.raises(InputError, match=f"`{key}` is of a DoRA"):
        read(tmp_path, pair() | {key: DOWN}, convert=lambda _: pair())


def test_a_text_encoders_key_is_refused_before_a_converter_may_drop_it(tmp_path):
    """diffusers' reader of FLUX leaves `lora_te` keys out where the others have diffusers' names."""
    with pytest.raises(InputError, match="`lora_te1_x.lora_down.weight` changes a text encoder") as caught:
        read(tmp_path, pair() | {"lora_te1_x.lora_down.weight": DOWN}, convert=lambda _: pair())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({}, None, "holds no LoRA layer"),
        ({"unet.conv_in.weight": DOWN}, None, "`unet.conv_in.weight` is of no plain LoRA"),
        (pair() | {f"unet.{PATH}to_q.lora_magnitude_vector": DOWN}, None, "DoRA"),
        ({"lora_te_text_model_x.lora_down.weight": DOWN}, None, "changes a text encoder, which stays frozen"),
        (pair() | {"text_encoder.x.lora_A.weight": DOWN}, None, "key `text_encoder.x.* changes a text encoder"),
        (pair() | {"text_encoder_2.x.lora_linear_layer.up.weight": UP}, None, "give a LoRA of the denoiser alone"),
        ({"transformer.a.lora_A.weight": DOWN}, None, "is unknown to `tiny`; is it a LoRA of this family"),
        (pair(), {"unet.r": 8, "unet.lora_alpha": 8}, "has rank 2, its header says 8"),
        (pair() | {f"unet.{PATH}to_q.lora.up.weight": torch.ones(5, 3)}, None, "have ranks 2 and 3"),
        (pair() | {f"unet.{PATH}to_q.lora.up.weight": torch.ones(4, 2)}, None, "up is 4 wide, `tiny` needs 5"),
        (pair() | {f"unet.{PATH}to_q.lora.up.weight": torch.ones(5)}, None, "up is 5 wide, `tiny` needs 5"),
        (pair() | {f"unet.{PATH}to_q.lora.down.weight": torch.tensor(1.0)}, None, "down is"),
        (pair() | {f"unet.{PATH}to_q.lora.down.weight": torch.ones(2, 7)}, None, "down is 7 wide, `tiny` needs 6"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, tensors, header, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, tensors, header)
    assert "\n" not in str(caught.value)


def test_a_pickle_and_a_broken_header_are_refused(tmp_path):
    torch.save({"unet.x": DOWN}, tmp_path / "lora.bin")
    with pytest.raises(InputError, match="lora.bin is truncated or no safetensors file"):
        read_lora(tmp_path / "lora.bin", {"unet": attention()}, "tiny")
    for text in ("{", "[]"):
        save_file(pair(), tmp_path / "y.safetensors", metadata={"dpt": text})
        with pytest.raises(InputError, match="header entry `dpt` is no JSON"):
            read_lora(tmp_path / "y.safetensors", {"unet": attention()}, "tiny")


def pefts_folder(folder: Path, config: dict[str, object]) -> Path:
    key = f"base_model.model.{PATH}to_q"
    save_file({f"{key}.lora_A.weight": DOWN, f"{key}.lora_B.weight": UP}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"r": 2, "lora_alpha": 16}, 16.0),
        ({"r": 2, "lora_alpha": 16, "use_rslora": True}, 16 * math.sqrt(2)),
        ({"r": 2, "lora_alpha": 16, "alpha_pattern": {"to_q": 3}}, 3.0),
    ],
)
def test_pefts_own_folder_keeps_its_alpha(tmp_path, config, alpha):
    layers = read_lora(pefts_folder(tmp_path, config), {"unet": attention()}, "tiny").layers
    assert layers[f"unet.{PATH}to_q"].alpha == pytest.approx(alpha)


def test_pefts_description_of_a_dora_or_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="adapter_config.json describes a DoRA"):
        read_lora(pefts_folder(tmp_path, {"r": 2, "use_dora": True}), {"unet": attention()}, "tiny")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="adapter_config.json is no JSON"):
        read_lora(tmp_path / "adapter_model.safetensors", {"unet": attention()}, "tiny")


@pytest.mark.parametrize("key", ["x.diff", "x.diff_b", "x.hada_w1_a", "x.lokr_w1", "bundle_emb.0", "x.lora_mid.weight"])
def test_what_a_converter_would_drop_is_refused_before_it_is_asked(tmp_path, key):
    with pytest.raises(InputError, match=f"key `{key}` is of no plain LoRA"):
        read(tmp_path, pair() | {key: DOWN}, convert=lambda _: pytest.fail("was asked"))


def test_a_converter_that_understands_a_part_alone_is_not_believed(tmp_path):
    mixed = {f"{name}.lora_{half}.weight": DOWN for name in ("diffusion_model.x", "y") for half in "AB"}
    with pytest.raises(InputError, match="diffusers understands only 2 of its 4 matrices for `tiny`"):
        read(tmp_path, mixed, convert=lambda _: pair())


def test_two_loras_for_one_module_are_refused(tmp_path):
    two = {f"unet.{PATH}to_q.lora_{half}.{name}.weight": DOWN if half == "A" else UP for half in "AB" for name in "ab"}
    with pytest.raises(InputError, match="is a second down of `unet.*to_q`; give a file with one LoRA in it"):
        read(tmp_path, two)


def test_an_alpha_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(InputError, match="NaN or infinite"):
        read(tmp_path, pair() | {f"unet.{PATH}to_q.alpha": torch.tensor(math.nan)})
