"""`dpt import-official` on a tiny base: what was in the checkpoint comes out, and nothing disappears unseen."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel

import dpt_t2i
from dpt_t2i import cli
from dpt_t2i.adapter.grounding_text import load_grounding_text
from dpt_t2i.adapter.io import load_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.lora import LORA_FILE, add_lora
from dpt_t2i.backbones.stable_diffusion import StableDiffusionBackbone
from dpt_t2i.config import AdapterConfig, ImportOfficialConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.model import load_model
from dpt_t2i.training.official import run_import
from tests.tiny import tiny_backbone

CPU = torch.device("cpu")
TEXT_WIDTH = 12  # of the tiny RoBERTa
SIZES = AdapterConfig(
    hidden_dim=16, num_heads=4, dim_feedforward=8, num_queries_matching=2, num_queries_rec=3, contrastive_dim=4,
    normalize_features=False,
)  # fmt: skip
MIDDLE = "unet.mid_block.attentions.{}.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"
FLAGS = ["--num_heads", "4", "--num_queries_matching", "2"]


def adapter_of(backbone: StableDiffusionBackbone, tap: str = "up1") -> DiscriminativeAdapter:
    torch.manual_seed(7)
    channels = {one.name: one.channels for one in backbone.parse_taps(tap)}
    adapter = DiscriminativeAdapter(SIZES, channels, backbone.pooled_dim, TEXT_WIDTH).eval()
    nn.init.constant_(adapter.logit_scale, 3.0)
    return adapter


def released_name(name: str) -> str:
    """Our adapter's name -> the release's, written out apart from the importer."""
    changes = [
        ("queries.", "query_embed."),
        ("timestep_encoding.linear_in", "timestep_embedding.time_embedding.linear_1"),
        ("timestep_encoding.linear_out", "timestep_embedding.time_embedding.linear_2"),
        ("match_head", "map_to_clip"),
        ("grounding.token_classifier", "class_embed"),
        ("grounding.query_align", "contrastive_align_projection_image"),
        ("grounding.token_align", "contrastive_align_projection_text"),
        ("grounding.box.0", "bbox_embed.layers.0"),
        ("grounding.box.2", "bbox_embed.layers.1"),
        ("grounding.box.4", "bbox_embed.layers.2"),
        ("projections.up1", "input_proj"),
        ("transformer.norm", "transformer.decoder.norm"),
    ]
    for ours, theirs in changes:
        if name.startswith(ours):
            return name.replace(ours, theirs, 1)
    return re.sub(r"^transformer\.(encoder|decoder)\.(\d)", r"transformer.\1.layers.\2", name)


def stage_one() -> dict[str, Tensor]:
    return {released_name(name): value for name, value in adapter_of(tiny_backbone()).state_dict().items()}


def stage_two() -> dict[str, Tensor]:
    """With a LoRA of rank 3 on every attention projection, under the names of 2023's attention processors."""
    backbone = tiny_backbone()
    add_lora(backbone, 3)
    lora = {}
    for number, (name, parameter) in enumerate(backbone.denoiser.named_parameters()):
        if ".lora_" not in name:
            continue
        key = name.replace(".to_out.0.", ".to_out.").replace(".to_", ".processor.to_")
        key = key.replace(".lora_A.dpt", "_lora.down").replace(".lora_B.dpt", "_lora.up")
        value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        lora[f"unet.{key}"] = 0.3 * value
    return stage_one() | lora


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def settings(base: Path, out: Path, **changes: object) -> ImportOfficialConfig:
    values = {"pretrained_model_name_or_path": str(base), "output_dir": out, "num_heads": 4, "num_queries_matching": 2}
    return ImportOfficialConfig(**(values | changes))  # type: ignore[arg-type]


def test_everything_is_taken_and_works(base: Path, tmp_path: Path) -> None:
    state, out = stage_two(), tmp_path / "out"
    result = run_import(settings(base, out), write(tmp_path, state))
    assert result["stage"] == 2 and result["counts"] == {"taken": len(state), "ignored": 0, "missing": 1}
    assert [row["key"] for row in result["table"]][:-1] == list(state)
    assert result["table"][-1]["key"] == "text_encoder.*" and "roberta-base" in result["table"][-1]["note"]
    model = load_model(str(base), str(out), str(out / "adapter"), device="cpu")
    wanted = adapter_of(tiny_backbone()).state_dict()
    assert model.adapter is not None and model.adapter.tap_channels == {"up1": 24}
    assert model.adapter.config.num_heads == 4 and not model.adapter.config.normalize_features
    for name, value in model.adapter.state_dict().items():
        assert torch.equal(value, wanted[name]), name


@torch.no_grad()
def test_the_lora_is_wx_plus_up_down_x_in_our_loader_and_in_stock_diffusers(base: Path, tmp_path: Path) -> None:
    state, out = stage_two(), tmp_path / "out"
    run_import(settings(base, out), write(tmp_path, state))
    plain = load_backbone(base, device="cpu")
    for name, module in plain.denoiser.named_modules():  # merged by hand: no LoRA code is used
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            key = f"unet.{name.replace('.to_out.0', '.to_out').replace('.to_', '.processor.to_')}_lora"
            module.weight += state[f"{key}.up.weight"] @ state[f"{key}.down.weight"]
    noisy, step = torch.randn(1, 4, 8, 8), torch.tensor([500])
    text = plain.encode_text(["a red circle"])
    wanted = plain.predict(noisy, step, text)[0]
    ours = load_model(str(base), str(out), device="cpu").backbone.predict(noisy, step, text)[0]
    stock = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    stock.load_lora_weights(out)
    theirs = stock.unet(noisy, step, encoder_hidden_states=text.tokens).sample
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - load_backbone(base, device="cpu").predict(noisy, step, text)[0]).abs().max() > 0.01


def test_a_stage_one_checkpoint_has_no_lora(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_import(settings(base, out), write(tmp_path, stage_one()))
    assert result["stage"] == 1 and result["lora"] is None and not (out / LORA_FILE).exists()
    assert result["counts"]["missing"] == 2
    assert load_adapter(out / "adapter", CPU, load_backbone(base, device="cpu").fingerprint())
    (out / LORA_FILE).touch()
    with pytest.raises(InputError, match="holds a LoRA, this stage-1 checkpoint has none"):
        run_import(settings(base, out), tmp_path / "pytorch_model.bin")


def test_without_the_alignment_loss_its_projections_start_afresh(base: Path, tmp_path: Path) -> None:
    """The release makes them for that loss alone (`--no_contrastive_align_loss`)."""
    state = {key: value for key, value in stage_two().items() if "contrastive_align" not in key}
    roberta = roberta_folder(tmp_path / "roberta")
    config = settings(base, tmp_path / "out", grounding_text=str(roberta))
    result = run_import(config, write(tmp_path, state))
    missing = [row["key"] for row in result["table"] if row["action"] == "missing"]
    parts = [f"contrastive_align_projection_{what}.{part}" for what in ("image", "text") for part in ("weight", "bias")]
    assert missing == [*parts, "text_encoder.*"] and result["counts"]["taken"] == len(state)
    adapter, _ = load_adapter(tmp_path / "out" / "adapter", CPU)
    wanted = adapter_of(tiny_backbone()).state_dict()
    assert (adapter.text_dim, adapter.config.contrastive_dim) == (TEXT_WIDTH, 64)  # the folder's, the release's default
    for name, value in adapter.state_dict().items():
        assert "_align" in name or torch.equal(value, wanted[name]), name
    half = state | {parts[0]: torch.zeros(64, 16)}
    with pytest.raises(InputError, match="no tensor for `grounding.token_align.weight`"):
        run_import(settings(base, tmp_path / "half"), write(tmp_path, half))


def test_a_lora_alone_is_no_import(base: Path, tmp_path: Path) -> None:
    state = {key: value for key, value in stage_two().items() if key.startswith("unet.")}
    with pytest.raises(InputError, match="the denoiser's LoRA alone .*--only_train_lora.* and no adapter"):
        run_import(settings(base, tmp_path / "out"), write(tmp_path, state))


def test_projections_without_a_lora_are_listed(base: Path, tmp_path: Path) -> None:
    lost = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    state = {key: value for key, value in stage_two().items() if not key.startswith(lost)}
    result = run_import(settings(base, tmp_path / "out"), write(tmp_path, state))
    missing = [row["key"] for row in result["table"] if row["action"] == "missing"]
    assert missing == ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "text_encoder.*"]


def tuned_roberta() -> RobertaModel:
    torch.manual_seed(3)
    sizes = {"hidden_size": TEXT_WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return RobertaModel(RobertaConfig(vocab_size=300, max_position_embeddings=20, **sizes)).eval()


def roberta_folder(folder: Path) -> Path:
    from transformers import RobertaTokenizerFast

    model = tuned_roberta()
    nn.init.zeros_(model.embeddings.word_embeddings.weight)  # what the checkpoint's must replace
    model.save_pretrained(folder)
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *letters]
    RobertaTokenizerFast(vocab={t: i for i, t in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    return folder


def with_roberta(state: dict[str, Tensor]) -> dict[str, Tensor]:
    tuned = {f"text_encoder.{name}": value for name, value in tuned_roberta().named_parameters()}
    return state | tuned | {"text_encoder.embeddings.position_ids": torch.arange(20)[None]}


def test_a_tuned_roberta_travels_inside_the_adapter(base: Path, tmp_path: Path) -> None:
    state, start = with_roberta(stage_one()), roberta_folder(tmp_path / "roberta")
    config = settings(base, tmp_path / "out", grounding_text=str(start))
    result = run_import(config, write(tmp_path, state))
    actions = {row["key"]: row["action"] for row in result["table"]}
    assert set(state) <= set(actions) and actions["text_encoder.embeddings.position_ids"] == "ignored"
    (tmp_path / "out").rename(tmp_path / "moved")
    adapter, _ = load_adapter(tmp_path / "moved" / "adapter", CPU)
    encoder = load_grounding_text(adapter.config.grounding_text, CPU)
    wanted = tuned_roberta().state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in encoder.encoder.state_dict().items())
    assert encoder(["the star"]).tokens.shape[-1] == TEXT_WIDTH


def test_a_tuned_roberta_without_its_start_keeps_its_weights(base: Path, tmp_path: Path) -> None:
    config = settings(base, tmp_path / "out", grounding_text=str(tmp_path / "nowhere"))
    result = run_import(config, write(tmp_path, with_roberta(stage_one())))
    assert (tmp_path / "out" / "adapter" / "grounding_text" / "model.safetensors").is_file()
    assert any("weights only" in row["note"] for row in result["table"])


def test_a_tuned_roberta_of_other_sizes_is_refused(base: Path, tmp_path: Path) -> None:
    state = with_roberta(stage_one()) | {"text_encoder.pooler.dense.bias": torch.zeros(5)}
    config = settings(base, tmp_path / "out", grounding_text=str(roberta_folder(tmp_path / "roberta")))
    with pytest.raises(InputError, match=r"`pooler.dense.bias` is \(5,\) in the checkpoint, \(12,\)"):
        run_import(config, write(tmp_path, state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_proj.weight": torch.zeros(16, 16, 1, 1)}, r"takes 16 channels.*taps of that width: bottom1, up2"),
        ({"map_to_clip.2.weight": torch.zeros(768, 16)}, r"text is 768 wide .*has 32; give its own base"),
        ({"mystery": torch.zeros(1)}, "`mystery` is unknown"),
        ({"unet.conv_in.weight": torch.zeros(1)}, "`unet.conv_in.weight` is of the denoiser but no attention LoRA"),
        (
            {MIDDLE.format(0): torch.zeros(3, 9)},
            "is 9 wide.*needs 32",
        ),
        (
            {MIDDLE.format(0): torch.zeros(2, 32)},
            "have ranks 2 and 3",
        ),
        (
            {MIDDLE.format(7): torch.zeros(3, 32)},
            "unknown to",
        ),
    ],
)  # fmt: skip
def test_another_base_or_an_unknown_key_is_one_line_and_writes_nothing(
    base: Path, tmp_path: Path, change: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run_import(settings(base, tmp_path / "out"), write(tmp_path, stage_two() | change))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_command_prints_the_table(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, stage_two())
    command = ["import-official", str(file), "--base", str(base), "--out", str(tmp_path / "out"), *FLAGS]
    assert cli.main([*command, "--unet_feature", "up1", "--nheads", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"taken +logit_scale +logit_scale", lines[0])
    assert "216 taken, 0 ignored, 1 missing" in lines
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["stage"] == 2 and len(result["table"]) == 217


def test_a_bad_checkpoint_is_one_line_and_exit_code_two(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, stage_one())
    file.write_bytes(file.read_bytes()[:1000])
    assert cli.main(["import-official", str(file), "--base", str(base), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "truncated" in printed.err
    assert "torch" in sys.modules and not (tmp_path / "out").exists()


def test_where_the_releases_file_is_given_as_ours_the_way_is_shown(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "released", stage_two())
    with pytest.raises(InputError, match="dpt import-official` makes LoRA and adapter of it"):
        dpt_t2i.load(str(base), lora=str(file), device="cpu")
    for given in (file, file.parent):
        with pytest.raises(InputError, match="dpt import-official` makes an adapter of it"):
            dpt_t2i.load(str(base), lora="none", adapter=str(given), device="cpu")
