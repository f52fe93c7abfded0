"""LoRA: where it goes, that stock diffusers reads the file exactly, and that a wrong file is told so."""

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dpt_t2i.backbones.lora import (
    LORA_FILE,
    add_lora,
    load_lora,
    lora_disabled,
    lora_file,
    lora_parameters,
    lora_scopes,
    place_lora,
    read_lora_header,
    remove_lora,
    save_lora,
)
from dpt_t2i.backbones.stable_diffusion import StableDiffusionBackbone
from dpt_t2i.errors import InputError
from tests.tiny import tiny_backbone, tiny_pipeline

NOISY = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def trained(rank: int = 4, alpha: float | None = None, **scope) -> StableDiffusionBackbone:
    """A backbone whose LoRA changes the prediction visibly."""
    backbone = tiny_backbone()
    for number, parameter in enumerate(add_lora(backbone, rank, alpha, **scope)):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    return backbone


@torch.no_grad()
def predict(backbone) -> torch.Tensor:
    return backbone.predict(NOISY, torch.tensor([500]), backbone.encode_text(["a red circle"]))[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[StableDiffusionBackbone, Path]:
    """A backbone with a LoRA of alpha 8, and the folder where that is saved; tests only read both."""
    backbone = trained(4, 8.0)
    folder = tmp_path_factory.mktemp("lora")
    save_lora(backbone, folder, {"seed": 3})
    return backbone, folder


def adapted_modules(backbone) -> set[str]:
    return {name.split(".lora_")[0] for name, _ in backbone.denoiser.named_parameters() if ".lora_" in name}


def test_a_fresh_lora_changes_nothing_and_alone_is_trainable():
    backbone = tiny_backbone()
    before = predict(backbone)
    parameters = add_lora(backbone, rank=4)
    assert torch.equal(predict(backbone), before)
    trainable = [parameter for parameter in backbone.denoiser.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} == {id(parameter) for parameter in parameters}
    # 3 down blocks of 1 attention, the middle of 1, 3 up blocks of 2: 10, each with self and cross attention.
    assert len(adapted_modules(backbone)) == 10 * 2 * 4
    assert len(parameters) == 2 * 80
    with pytest.raises(RuntimeError, match="already"):
        add_lora(backbone, rank=4)


def test_scale_is_alpha_over_rank():
    # With B and A fixed, the LoRA's change of one projection is linear in alpha.
    one, double = trained(rank=4), trained(rank=4, alpha=8)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    states = torch.randn(1, 5, 32)
    with torch.no_grad():
        layer, base = one.denoiser.get_submodule(name), one.denoiser.get_submodule(name).base_layer
        by_hand = base(states) + states @ layer.lora_A["dpt"].weight.T @ layer.lora_B["dpt"].weight.T
        torch.testing.assert_close(layer(states), by_hand)
        change = double.denoiser.get_submodule(name)(states) - base(states)
        torch.testing.assert_close(change, 2 * (by_hand - base(states)))


def test_scope_to_tap_takes_exactly_what_feeds_the_tap():
    backbone = trained(scope="to_tap", taps=tiny_backbone().parse_taps("up1"))
    blocks = {".".join(name.split(".")[:2]) for name in adapted_modules(backbone)}
    assert blocks == {"down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block.attentions", "up_blocks.1"}
    inner = tiny_backbone()
    add_lora(inner, 2, scope="to_tap", taps=inner.parse_taps("up_blocks.1.attentions.0"))
    assert {name for name in adapted_modules(inner) if name.startswith("up_")} == {
        f"up_blocks.1.attentions.0.transformer_blocks.0.{attention}.{projection}"
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out.0")
    }
    with pytest.raises(InputError, match="needs a tap"):
        add_lora(tiny_backbone(), 2, scope="to_tap")


def test_lora_is_float32_on_half_precision_weights():
    backbone = StableDiffusionBackbone(tiny_pipeline().to(torch.bfloat16))
    assert {parameter.dtype for parameter in add_lora(backbone, rank=2)} == {torch.float32}
    assert torch.isfinite(predict(backbone)).all()


def test_disabled_is_the_base_and_what_was_trainable_stays_so():
    plain, backbone = predict(tiny_backbone()), trained()
    parameters = lora_parameters(backbone)
    parameters[0].requires_grad_(False)
    with_lora = predict(backbone)
    assert not torch.allclose(with_lora, plain)
    with pytest.raises(KeyError), lora_disabled(backbone):
        assert torch.equal(predict(backbone), plain)
        raise KeyError
    assert torch.equal(predict(backbone), with_lora)
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)
    remove_lora(backbone)
    assert not lora_parameters(backbone)
    assert torch.equal(predict(backbone), plain)


@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (2, 3.0)])
def test_stock_diffusers_reads_the_file_exactly(tmp_path, rank, alpha):
    backbone = trained(rank, alpha)
    save_lora(backbone, tmp_path, {})
    stock = tiny_pipeline()
    stock.load_lora_weights(tmp_path)
    text = backbone.encode_text(["a red circle"]).tokens
    with torch.no_grad():
        theirs = stock.unet(NOISY, torch.tensor([500]), encoder_hidden_states=text).sample
    assert torch.equal(theirs, predict(backbone))


@pytest.mark.parametrize("scope", [{}, {"scope": "to_tap", "taps": tiny_backbone().parse_taps("up1")}])
def test_round_trip_through_our_own_reader(tmp_path, scope):
    backbone = trained(4, 8.0, **scope)
    save_lora(backbone, tmp_path, {"rank": 4, "tap": "up1"})
    again = trained(rank=2)  # whose own LoRA is replaced
    header = load_lora(again, tmp_path)
    assert torch.equal(predict(again), predict(backbone))
    assert not any(parameter.requires_grad for parameter in lora_parameters(again))
    assert header == read_lora_header(tmp_path / LORA_FILE)
    assert header["config"] == {"rank": 4, "tap": "up1"}
    assert header["base"] == backbone.fingerprint()
    assert set(header["versions"]) >= {"dpt-t2i", "diffusers", "peft", "torch"}
    load_lora(again, tmp_path, trainable=True)
    assert all(parameter.requires_grad for parameter in lora_parameters(again))
    save_lora(again, tmp_path / "again", {})
    one, two = load_file(tmp_path / LORA_FILE), load_file(tmp_path / "again" / LORA_FILE)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_values_are_not_rounded_to_the_bases_dtype(made):
    _, folder = made
    backbone = StableDiffusionBackbone(tiny_pipeline().to(torch.bfloat16))
    load_lora(backbone, folder)
    stored = load_file(folder / LORA_FILE)["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.up.weight"]
    layer = backbone.denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    assert torch.equal(layer.lora_B["dpt"].weight, stored)


def test_attention_processor_names_of_2023_are_read(tmp_path):
    backbone = trained()  # such files know no alpha
    save_lora(backbone, tmp_path, {})
    renamed = {
        key.replace(".to_out.0.lora.", ".to_out.lora.")
        .replace(".to_", ".processor.to_")
        .replace(".lora.", "_lora."): value
        for key, value in load_file(tmp_path / LORA_FILE).items()
    }
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.up.weight" in renamed
    save_file(renamed, tmp_path / "old.safetensors")
    again = tiny_backbone()
    assert load_lora(again, tmp_path / "old.safetensors") == {}
    assert torch.equal(predict(again), predict(backbone))


def test_other_weights_of_the_same_architecture_are_a_warning(made, caplog):
    _, folder = made
    with caplog.at_level(logging.WARNING, logger="dpt_t2i"):
        load_lora(tiny_backbone(seed=1), folder)
    assert "`tiny-0`" in caplog.text and "`tiny-1`" in caplog.text
    caplog.clear()
    load_lora(tiny_backbone(seed=0), folder)
    assert not [record for record in caplog.records if record.name.startswith("dpt_t2i")]


def rewrite(source, target, change, keep_header=True):
    """Copy a LoRA file with its tensors changed."""
    with safe_open(source / LORA_FILE, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(source / LORA_FILE)
    change(tensors)
    save_file(tensors, target, metadata=header if keep_header else None)


KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({KEY.replace("mid_block", "ghost_block"): t.pop(KEY)}),
            "made for base `tiny-0`: .*ghost_block",
        ),
        (
            lambda t: t.update({KEY.replace("unet.", "text_encoder."): t[KEY].clone()}),
            "text_encoder.* changes a text encoder",
        ),
        (lambda t: t.pop(KEY), "incomplete"),
        (lambda t: t.update({KEY: torch.zeros(4, 99)}), "is 99 wide, `tiny-0` needs 32"),
        (lambda t: t[KEY].fill_(float("nan")), "NaN"),
    ],
)
def test_a_wrong_file_is_refused_and_the_lora_in_place_survives(made, tmp_path, change, message):
    backbone, folder = made
    before = predict(backbone)
    rewrite(folder, tmp_path / "wrong.safetensors", change)
    with pytest.raises(InputError, match=message):
        load_lora(backbone, tmp_path / "wrong.safetensors")
    assert torch.equal(predict(backbone), before)


def test_missing_and_truncated_files_are_named(made, tmp_path):
    backbone, folder = made
    with pytest.raises(InputError, match=f"{LORA_FILE} does not exist"):
        load_lora(backbone, tmp_path)
    whole = (folder / LORA_FILE).read_bytes()
    for length in (0, 4, 1000, len(whole) - 10):
        (tmp_path / LORA_FILE).write_bytes(whole[:length])
        with pytest.raises(InputError, match=f"{LORA_FILE} is truncated"):
            load_lora(backbone, tmp_path)


def test_another_architecture_is_an_error_that_names_both(made):
    wider = tiny_pipeline()
    config = {**wider.unet.config, "block_out_channels": (16, 16, 24, 32)}
    wider.unet = UNet2DConditionModel.from_config(config)
    with pytest.raises(InputError, match=r"made for base `tiny-0` \(block_out_channels \[8.*`wide` \(block_out"):
        load_lora(StableDiffusionBackbone(wider, "wide"), made[1])


def test_a_kohya_file_keeps_its_alpha(made, tmp_path):
    backbone, folder = made
    kohya = {}
    for key, value in load_file(folder / LORA_FILE).items():
        name, half = key.removeprefix("unet.").rsplit(".lora.", 1)
        stem = "lora_unet_" + name.replace(".", "_")
        kohya[f"{stem}.lora_{half}"] = value
        kohya[f"{stem}.alpha"] = torch.tensor(8.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    again = tiny_backbone()
    load_lora(again, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(predict(again), predict(backbone))


def test_tensors_out_of_no_file_are_placed_with_scale_one(made):
    backbone, folder = made
    again = trained(rank=2)
    place_lora(again, load_file(folder / LORA_FILE), "the checkpoint", trainable=True)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = again.denoiser.get_submodule(name)
    assert torch.equal(layer.lora_B["dpt"].weight, backbone.denoiser.get_submodule(name).lora_B["dpt"].weight)
    assert layer.scaling["dpt"] == 1.0 and layer.lora_B["dpt"].weight.requires_grad
    with pytest.raises(InputError, match="the checkpoint: key `x.lora_A.weight` is unknown to `tiny-0`"):
        place_lora(again, {"x.lora_A.weight": torch.ones(1, 1)}, "the checkpoint")


def test_the_header_is_json_and_nothing_else_is_written(made):
    _, folder = made
    with safe_open(folder / LORA_FILE, framework="pt") as opened:
        header = opened.metadata()
    assert json.loads(header["lora_adapter_metadata"])["unet.r"] == 4
    assert json.loads(header["dpt"])["config"] == {"seed": 3}
    assert [file.name for file in folder.iterdir()] == [LORA_FILE]


def test_a_folder_stands_for_its_one_file_and_an_adapters_folder_is_told_from_a_loras(tmp_path):
    for name in ("named", "two", "run", "adapter"):
        (tmp_path / name).mkdir()
    for file in ("named/sd-dpt.safetensors", "two/a.safetensors", "two/b.safetensors", "adapter/model.safetensors"):
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "adapter" / "config.json").write_text("{}")
    (tmp_path / "run" / "adapter").mkdir()
    assert lora_file(tmp_path / "named") == tmp_path / "named" / "sd-dpt.safetensors"
    (tmp_path / "named" / "adapter").mkdir()  # as `dpt export --format kohya` leaves it
    assert lora_file(tmp_path / "named") == tmp_path / "named" / "sd-dpt.safetensors"
    with pytest.raises(InputError, match="name one of its 2 .safetensors files"):
        lora_file(tmp_path / "two")
    for folder in ("run", "adapter"):
        with pytest.raises(InputError, match="holds an adapter and no LoRA; give it as --adapter, with --lora none"):
            lora_file(tmp_path / folder)


@pytest.mark.parametrize("scope", ["all", "to_tap"])
def test_the_scope_of_a_lora_can_be_told(scope):
    backbone = tiny_backbone()
    taps = backbone.parse_taps("bottom1")
    assert lora_scopes(backbone, taps) == []
    add_lora(backbone, 2, scope=scope, taps=taps)
    assert lora_scopes(backbone, taps) == [scope]
    assert lora_scopes(backbone, backbone.parse_taps("bottom0")) == (["all"] if scope == "all" else [])
    assert lora_scopes(backbone, backbone.parse_taps("up3")) == (["all", "to_tap"] if scope == "all" else [])
