"""What every family must keep, checked on a backbone of it by `test_contract.py`.

A check may change the backbone (it adds a LoRA, trains, casts), so each gets a fresh one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.lora import add_lora, load_lora, lora_parameters, remove_lora, save_lora
from dpt_t2i.backbones.types import Tap, TextStates
from tests.backbones.memory import LiveBytes

PROMPTS = ("a red circle", "two blue stars above the green square")
TIMESTEPS = torch.tensor([500, 37])


def name_of(check: Callable[[Backbone], None]) -> str:
    return check.__name__


def latents(backbone: Backbone) -> Tensor:
    """A batch of two, twice as wide as high, so that a swap of the sides shows; 2 pixels high at the deepest tap."""
    side = 2 * max(tap.stride for tap in backbone.taps.values())
    shape = (2, backbone.latent_channels, side, 2 * side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def inputs(backbone: Backbone) -> tuple[Tensor, Tensor, TextStates]:
    return latents(backbone), TIMESTEPS, backbone.encode_text(PROMPTS)


def tap_shapes_are_those_of_the_table(backbone: Backbone) -> None:
    noisy, timesteps, text = inputs(backbone)
    with torch.no_grad():
        prediction, features = backbone.predict(noisy, timesteps, text, tuple(backbone.taps.values()))
    assert prediction.shape == noisy.shape
    assert list(features.maps) == list(backbone.taps)
    for name, tap in backbone.taps.items():
        height, width = (side // tap.stride for side in noisy.shape[-2:])
        assert features.maps[name].shape == (2, tap.channels, height, width), name
        assert features.maps[name].std() > 0, name


def rows_and_columns_stay_where_they_were(backbone: Backbone) -> None:
    """A change of the latents' right end moves the map's right end most (at random weights every block is local)."""
    noisy, timesteps, text = inputs(backbone)
    changed = noisy.clone()
    changed[..., -1:] += 1.0
    tap = min(backbone.taps.values(), key=lambda tap: tap.stride)
    with torch.no_grad():
        before, after = (backbone.features(z, timesteps, text, [tap]).maps[tap.name] for z in (noisy, changed))
    moved = (after - before).abs().mean(dim=(0, 1, 2))
    assert int(moved.argmax()) >= len(moved) // 2, moved


def an_early_exit_gives_the_same_bits(backbone: Backbone) -> None:
    noisy, timesteps, text = inputs(backbone)
    taps = tuple(backbone.taps.values())
    with torch.no_grad():
        _, late = backbone.predict(noisy, timesteps, text, taps)
        for tap in taps:
            assert torch.equal(backbone.features(noisy, timesteps, text, [tap]).maps[tap.name], late.maps[tap.name])
    assert not any(module._forward_hooks for module in backbone.denoiser.modules())


def features_cost_the_blocks_up_to_the_tap(backbone: Backbone) -> None:
    """Counted another way: in a full pass, what has been spent at the moment when the tap's module returns."""
    noisy, timesteps, text = inputs(backbone)
    table = tuple(backbone.taps.values())
    taps = dict.fromkeys((table[0], middle_tap(backbone), table[-1]))
    spent: dict[str, int] = {}
    with torch.no_grad(), FlopCounterMode(display=False) as full:
        handles = [
            backbone.denoiser.get_submodule(tap.module).register_forward_hook(
                lambda *_, name=tap.name: spent.update({name: full.get_total_flops()})
            )
            for tap in taps
        ]
        backbone.predict(noisy, timesteps, text)
    for handle in handles:
        handle.remove()
    costs = []
    for tap in taps:
        with torch.no_grad(), FlopCounterMode(display=False) as early:
            backbone.features(noisy, timesteps, text, [tap])
        costs.append(early.get_total_flops())
        assert costs[-1] == spent[tap.name], tap.name
    assert 0 < costs[0] < costs[-1] <= full.get_total_flops()
    assert costs == sorted(costs)


def gradients_reach_latents_and_lora(backbone: Backbone) -> None:
    tap = middle_tap(backbone)
    parameters = trained_lora(backbone, scope="to_tap", taps=[tap])
    point, *others = gradients(backbone, tap, parameters)
    assert point.abs().amax(dim=(1, 2, 3)).min() > 0
    assert all(gradient.abs().max() > 0 for gradient in others)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    remove_lora(backbone)
    assert not lora_parameters(backbone)


def checkpointing_changes_no_number(backbone: Backbone) -> None:
    tap = middle_tap(backbone)
    parameters = trained_lora(backbone, scope="to_tap", taps=[tap])
    noisy, timesteps, text = inputs(backbone)
    plain, features = gradients(backbone, tap, parameters), backbone.features(noisy, timesteps, text, [tap])
    backbone.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    backbone.denoiser.train()  # diffusers checkpoints in training mode only
    again, checkpointed = gradients(backbone, tap, parameters), backbone.features(noisy, timesteps, text, [tap])
    assert torch.equal(features.maps[tap.name], checkpointed.maps[tap.name])
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def checkpointing_lowers_the_peak(backbone: Backbone) -> None:
    """Of forward and backward of the denoising loss, beside the weights and their gradients."""
    parameters = trained_lora(backbone)
    noisy, timesteps, text = inputs(backbone)
    backbone.denoiser.train()

    def peak() -> int:
        with LiveBytes([*backbone.denoiser.parameters(), noisy, text.tokens, text.pooled]) as live:
            torch.autograd.grad(backbone.predict(noisy, timesteps, text)[0].square().sum(), parameters)
        return live.peak

    plain = peak()
    backbone.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    assert peak() < 0.75 * plain


def autocast_and_half_precision_stay_inside(backbone: Backbone) -> None:
    tap = middle_tap(backbone)
    noisy, timesteps, text = inputs(backbone)
    with torch.no_grad():
        exact = backbone.features(noisy, timesteps, text, [tap]).maps[tap.name]
        for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
            with torch.autocast("cpu", dtype):
                cast = backbone.features(noisy, timesteps, text, [tap]).maps[tap.name]
            assert not torch.equal(exact, cast)
            assert close(exact, cast, tolerance), dtype
    trained_lora(backbone)
    backbone.pipeline.to(torch.bfloat16)
    add_back = lora_parameters(backbone)
    for parameter in add_back:
        parameter.data = parameter.data.float()
    text = backbone.encode_text(PROMPTS)
    point = noisy.clone().requires_grad_(True)
    prediction, features = backbone.predict(point, timesteps, text, [tap])
    outside = (text.tokens, text.pooled, prediction, features.maps[tap.name])
    assert {tensor.dtype for tensor in outside} == {torch.float32}
    features.maps[tap.name].square().sum().backward()
    assert point.grad is not None and point.grad.abs().max() > 0
    with torch.no_grad():
        pixels = backbone.decode_image(backbone.encode_image(torch.zeros(1, 3, 8, 8)))
    assert pixels.dtype == torch.float32 and bool(torch.isfinite(pixels).all())


def texts_are_rows(backbone: Backbone) -> None:
    """Encoding alone, in a batch, or once and spread out again is the same; a mask tells what is padding."""
    texts = backbone.encode_text([*PROMPTS, ""])
    assert texts.tokens.shape[::2] == (3, backbone.text_dim)
    assert texts.pooled.shape == (3, backbone.pooled_dim)
    assert texts.mask.shape == texts.tokens.shape[:2] and texts.mask.dtype == torch.bool
    assert texts.mask.any(dim=1).all() and not texts.mask.all()
    assert not torch.allclose(texts.pooled[0], texts.pooled[1], atol=1e-3)
    alone = TextStates.cat([backbone.encode_text([prompt]) for prompt in (*PROMPTS, "")])
    spread = texts.select(torch.tensor([1, 0, 1]))
    for key, value in tensors_of(texts).items():
        torch.testing.assert_close(value, tensors_of(alone)[key], rtol=1e-4, atol=1e-5)
        assert torch.equal(tensors_of(spread)[key], value[[1, 0, 1]]), key
    null = backbone.null_text(2)
    assert len(null) == 2 and null.tokens.shape[1:] == texts.tokens.shape[1:]
    assert {key: value.shape[1:] for key, value in null.extras.items()} == {
        key: value.shape[1:] for key, value in texts.extras.items()
    }


def a_text_and_its_extras_decide_the_prediction(backbone: Backbone) -> None:
    noisy, timesteps, text = inputs(backbone)
    swapped = text.select(torch.tensor([1, 0]))
    with torch.no_grad():
        straight, _ = backbone.predict(noisy, timesteps, text)
        other, _ = backbone.predict(noisy, timesteps, swapped)
        back, _ = backbone.predict(noisy.flip(0), timesteps.flip(0), swapped)
    assert not torch.allclose(straight, other, atol=1e-5)
    torch.testing.assert_close(straight, back.flip(0), rtol=1e-4, atol=1e-5)


def offsets_line_up_with_tokens(backbone: Backbone) -> None:
    prompt = "a  red circle"
    row = backbone.token_offsets([prompt])[0]
    states = backbone.encode_text([prompt])
    assert len(row) <= states.tokens.shape[1]
    words = [prompt[start:end] for start, end in row if end > start]
    assert "".join(words).replace(" ", "") == "aredcircle"
    assert all(end == start for index, (start, end) in enumerate(row) if not states.mask[0, index])


def images_go_in_and_come_out(backbone: Backbone) -> None:
    side = 4 * backbone.vae_scale
    pixels = torch.rand(2, 3, side, 2 * side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        clean = backbone.encode_image(pixels)
        assert clean.shape == (2, backbone.latent_channels, 4, 8)
        assert backbone.decode_image(clean).shape == pixels.shape
    assert all(size % backbone.vae_scale == 0 for size in backbone.image_size)


def noise_grows_with_the_timestep(backbone: Backbone) -> None:
    clean, noise = torch.full_like(latents(backbone), 2.0), latents(backbone)
    last = backbone.num_train_timesteps - 1
    early, late = (backbone.add_noise(clean, noise, torch.full((2,), t)) for t in (1, last))
    assert (early - clean).abs().mean() < 0.2 < (late - clean).abs().mean()
    snr = backbone.snr(torch.tensor([1, last // 2, last]))
    assert snr[0] > snr[1] > snr[2] >= 0
    assert backbone.target(clean, noise, TIMESTEPS).shape == clean.shape


def one_timestep_stands_for_all_rows(backbone: Backbone) -> None:
    noisy, _, text = inputs(backbone)
    tap, each = middle_tap(backbone), torch.tensor([500, 500])
    noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = backbone.features(noisy, each, text, [tap])
        for one in (500, torch.tensor(500), torch.tensor([500])):
            found = backbone.features(noisy, one, text, [tap])
            assert torch.equal(found.maps[tap.name], wanted.maps[tap.name]) and found.timesteps.tolist() == [500, 500]
            assert torch.equal(backbone.predict(noisy, one, text)[0], backbone.predict(noisy, each, text)[0])
            assert torch.equal(backbone.add_noise(noisy, noise, one), backbone.add_noise(noisy, noise, each))


def a_fingerprint_is_json_and_knows_the_weights(backbone: Backbone) -> None:
    fingerprint = backbone.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint.keys() == {"architecture", "name", "weights", "parts"}
    assert {"family", "text_width", "prediction_type"} <= fingerprint["architecture"].keys()
    trained_lora(backbone)
    assert backbone.fingerprint() == fingerprint
    remove_lora(backbone)
    with torch.no_grad():
        next(backbone.denoiser.parameters()).add_(1.0)
    assert backbone.fingerprint()["weights"] != fingerprint["weights"]
    assert backbone.fingerprint()["architecture"] == fingerprint["architecture"]


def a_lora_file_comes_back_exactly(backbone: Backbone) -> None:
    noisy, timesteps, text = inputs(backbone)

    def predict() -> Tensor:
        with torch.no_grad():
            return backbone.predict(noisy, timesteps, text)[0]

    plain = predict()
    trained_lora(backbone, rank=2, alpha=3.0)
    tuned = predict()
    assert not torch.allclose(plain, tuned, atol=1e-4)
    with TemporaryDirectory() as folder:
        save_lora(backbone, Path(folder), {})
        remove_lora(backbone)
        assert torch.equal(predict(), plain)
        # As trainable as it was: on a slice of a batch (an MMDiT's) torch picks the kernel of a product by that.
        load_lora(backbone, Path(folder), trainable=True)
    assert torch.equal(predict(), tuned)


CHECKS: tuple[Callable[[Backbone], None], ...] = (
    tap_shapes_are_those_of_the_table,
    rows_and_columns_stay_where_they_were,
    an_early_exit_gives_the_same_bits,
    features_cost_the_blocks_up_to_the_tap,
    gradients_reach_latents_and_lora,
    checkpointing_changes_no_number,
    checkpointing_lowers_the_peak,
    autocast_and_half_precision_stay_inside,
    texts_are_rows,
    a_text_and_its_extras_decide_the_prediction,
    offsets_line_up_with_tokens,
    images_go_in_and_come_out,
    noise_grows_with_the_timestep,
    one_timestep_stands_for_all_rows,
    a_fingerprint_is_json_and_knows_the_weights,
    a_lora_file_comes_back_exactly,
)


def compiled_gives_the_same_features(backbone: Backbone, backend: str = "inductor") -> None:
    """Slow: the compiler runs. Call it from a test marked `slow`."""
    tap = middle_tap(backbone)
    noisy, timesteps, text = inputs(backbone)
    with torch.no_grad():
        eager, _ = backbone.predict(noisy, timesteps, text)
        early = backbone.features(noisy, timesteps, text, [tap]).maps[tap.name]
        backbone.denoiser.compile(backend=backend)
        assert close(eager, backbone.predict(noisy, timesteps, text)[0], 1e-4)
        assert close(early, backbone.features(noisy, timesteps, text, [tap]).maps[tap.name], 1e-4)


def middle_tap(backbone: Backbone) -> Tap:
    taps = tuple(backbone.taps.values())
    return taps[len(taps) // 2]


def trained_lora(backbone: Backbone, rank: int = 2, alpha: float | None = None, **scope) -> list[nn.Parameter]:
    """A LoRA whose B is not zero: zero would hide the gradient of A."""
    parameters = add_lora(backbone, rank, alpha, **scope)
    for number, parameter in enumerate(parameters):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    return parameters


def gradients(backbone: Backbone, tap: Tap, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    noisy, timesteps, text = inputs(backbone)
    point = noisy.clone().requires_grad_(True)
    value = backbone.features(point, timesteps, text, [tap]).maps[tap.name].square().sum()
    return torch.autograd.grad(value, [point, *parameters])


def close(one: Tensor, other: Tensor, relative: float) -> bool:
    return float((one - other).norm()) <= relative * float(one.norm())


def tensors_of(text: TextStates) -> dict[str, Tensor]:
    return {"tokens": text.tokens, "pooled": text.pooled, "mask": text.mask, **text.extras}


def stock_latents(pipeline: Any) -> Tensor:
    """What a stock pipeline makes of fixed noise in two steps: the final latents of the images."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    made: Tensor = pipeline(
        list(PROMPTS), num_inference_steps=2, latents=noise, output_type="latent", height=32, width=32
    ).images
    return made


def stock_diffusers_reads_the_lora_file(folder: Path, tmp_path: Path) -> None:
    """A transformer's LoRA file through diffusers' own loader gives our prediction, and comes off again."""
    backbone = load_backbone(folder, device="cpu")
    trained_lora(backbone, rank=2, alpha=3.0)
    file = save_lora(backbone, tmp_path, {})
    assert all(key.startswith("transformer.") and ".lora_" in key for key in load_file(file))
    with torch.no_grad():
        tuned, _ = backbone.predict(*inputs(backbone))
    stock = load_backbone(folder, device="cpu")
    stock.pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        theirs, _ = stock.predict(*inputs(stock))
        stock.pipeline.unload_lora_weights()
        plain, _ = stock.predict(*inputs(stock))
    torch.testing.assert_close(theirs, tuned, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, tuned, atol=1e-2)
