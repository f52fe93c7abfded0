"""`dpt doctor`: what this machine offers, whether the model loads on it, and roughly what fits.

Memory is measured, not tabulated: one pass of the denoiser at its own image size, counting the bytes that autograd
keeps for the way back. Rough it stays: kernels need working memory too, hence the reserve.
"""

from __future__ import annotations

import platform
from typing import Any

import psutil
import torch
from torch import Tensor

from dpt_t2i.adapter.io import load_adapter
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.loading import choose_artifacts, load_backbone, resolve_device
from dpt_t2i.backbones.lora import load_lora, lora_file, remove_lora
from dpt_t2i.backbones.types import Tap
from dpt_t2i.config import DoctorConfig, ModelConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.scoring import MatchScorer
from dpt_t2i.versions import installed

STACK = ("dpt-t2i", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "pydantic", "typer")
OPTIONAL = ("gradio", "datasets", "tensorboard", "trackio", "wandb")
RESERVE = 0.25  # share of the free memory left to kernels, optimiser and the rest of the machine
PASSES = 6  # of the denoiser for one training example (method: five for matching, one for grounding)
TAP = "up1"  # where a denoiser has it, else the tap in its middle
GIB = 2**30


def run_doctor(config: DoctorConfig | None = None) -> dict[str, Any]:
    """Look at machine, stack and model.

    Returns:
        `python platform versions device memory threads model fits summary`. A model that does not load is a finding
        (`model.loads` false, `model.problem` the reason), not an error.

    Raises:
        InputError: the device that was asked for is not here.
    """
    model = (config or DoctorConfig()).model
    device = resolve_device(model.device)
    free, total = _memory(device)
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: installed(name) for name in (*STACK, *OPTIONAL)},
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "memory": {"free_gib": round(free / GIB, 2), "total_gib": round(total / GIB, 2)},
        "threads": torch.get_num_threads(),
    }
    result |= _look_at_model(model)
    return result | {"summary": _summary(result)}


def activation_bytes(backbone: Backbone, whole: bool) -> int:
    """Bytes that autograd keeps for one image of the backbone's own size, batch 1, parameters not counted.

    Args:
        whole: through the whole denoiser with gradients to its weights (an upper bound of tuning), or up to the tap
            with a gradient to the latents alone (self-correction).
    """
    parameters = {parameter.data_ptr() for parameter in backbone.denoiser.parameters()}
    kept: dict[int, int] = {}  # storage -> bytes; a storage that several nodes keep counts once

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    height, width = (side // backbone.vae_scale for side in backbone.image_size)
    latents = torch.zeros(1, backbone.latent_channels, height, width, device=backbone.device, requires_grad=True)
    timesteps = torch.full((1,), 500, device=backbone.device)
    text = backbone.encode_text([""])
    frozen = [parameter for parameter in backbone.denoiser.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(whole)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # the result keeps the graph, and with it every counted storage, alive until the sum is taken
            held: Any = (
                backbone.predict(latents, timesteps, text)
                if whole
                else backbone.features(latents, timesteps, text, [_tap(backbone)])
            )
            size = sum(kept.values())
        del held
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return size


def _tap(backbone: Backbone) -> Tap:
    taps = list(backbone.taps.values())
    return backbone.taps.get(TAP, taps[len(taps) // 2])


def _look_at_model(model: ModelConfig) -> dict[str, Any]:
    """The keys `model` and `fits` of the result."""
    name = model.pretrained_model_name_or_path
    try:
        backbone = load_backbone(name, model.revision, model.device, model.dtype)
        lora, adapter = choose_artifacts(name, model.lora, model.adapter, model.revision)
        lora = None if lora is None else lora_file(lora)
        if lora is not None:
            load_lora(backbone, lora)  # whether the base takes it
        if adapter is not None:
            MatchScorer.of(backbone, load_adapter(adapter, torch.device("cpu"), backbone.fingerprint())[0])
        remove_lora(backbone)
    except InputError as error:
        return {"model": {"name": name, "loads": False, "problem": str(error)}, "fits": None}
    found = {
        "name": backbone.name,
        "loads": True,
        "denoiser_parameters": sum(parameter.numel() for parameter in backbone.denoiser.parameters()),
        "image_size": list(backbone.image_size),
        "prediction_type": backbone.prediction_type,
        "taps": list(backbone.taps),
        "lora": None if lora is None else lora.name,
        "adapter": adapter is not None,
    }
    return {"model": found, "fits": _fits(backbone)}


def _fits(backbone: Backbone) -> dict[str, int] | None:
    """Largest power of two of examples at once (tune), 0 = not one; whether an image can be corrected (1 or 0), which
    `generate` does one at a time.
    """
    try:
        tuning = PASSES * activation_bytes(backbone, whole=True)
        correcting = activation_bytes(backbone, whole=False)
    except torch.OutOfMemoryError:
        return {"tune_batch": 0, "corrected_image": 0}
    budget = (1 - RESERVE) * _memory(backbone.device)[0]  # what the loaded weights left free
    return {"tune_batch": _power_below(budget / tuning), "corrected_image": int(correcting <= budget)}


def _power_below(number: float) -> int:
    return 2 ** (int(number).bit_length() - 1) if number >= 1 else 0


def _memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of the device; on a CPU or an Apple GPU those of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    machine = psutil.virtual_memory()
    return machine.available, machine.total


def _summary(result: dict[str, Any]) -> list[str]:
    versions, memory, model, fits = (result[key] for key in ("versions", "memory", "model", "fits"))
    lines = [
        f"python    {result['python']} on {result['platform']}",
        "stack     " + ", ".join(f"{name} {versions[name] or 'missing'}" for name in STACK),
        "extras    " + (", ".join(f"{name} {versions[name]}" for name in OPTIONAL if versions[name]) or "none"),
        f"device    {result['device']} ({result['device_name']}), {result['threads']} CPU threads, "
        f"{memory['free_gib']} of {memory['total_gib']} GiB free",
    ]
    if not model["loads"]:
        return [*lines, f"model     does not load: {model['problem']}"]
    height, width = model["image_size"]
    lora, adapter = model["lora"] or "none", "found" if model["adapter"] else "none"
    lines += [
        f"model     {model['name']} loads: {model['denoiser_parameters'] / 1e6:.1f} M parameters in the denoiser, "
        f"{width}x{height} pixels, predicts {model['prediction_type']}; LoRA {lora}, adapter {adapter}",
        f"taps      {' '.join(model['taps'])}",
    ]
    if fits is not None:
        corrected = "fits" if fits["corrected_image"] else "does not fit"
        lines.append(
            f"fits      roughly --train_batch_size {fits['tune_batch']} in tune; in generate an image with "
            f"self-correction {corrected}"
        )
    return lines
