"""FSDP: the frozen denoiser in parts, one on each process, which lend them to each other block by block.

What is trained, LoRA and adapter, is small and stays whole everywhere. So checkpoints, running average, clipping and
exported files are those of any other run, and only the mean of the gradients has to be taken here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.lora import lora_parameters
from dpt_t2i.errors import InputError


def sharding_asked() -> bool:
    """Does the launcher ask for FSDP? Accelerate itself listens to it on a GPU only."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def read_plugin() -> FullyShardedDataParallelPlugin:
    """The launcher's settings (`fsdp_config` of its config file).

    Raises:
        InputError: a setting that accelerate refuses, or one that training cannot follow.
    """
    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, ImportError, KeyError) as error:
        raise InputError(f"fsdp_config: {error}") from error
    if plugin.fsdp_version != 2 or not hasattr(FSDPModule, "reset_iter_state"):
        raise InputError(
            f"fsdp_version {plugin.fsdp_version} with torch {torch.__version__}: training needs fsdp_version 2 and "
            "torch 2.13; launch with --config_file configs/fsdp.yaml"
        )
    if plugin.auto_wrap_policy is not transformer_auto_wrap_policy:
        raise InputError("fsdp_auto_wrap_policy: set TRANSFORMER_BASED_WRAP, which shards the denoiser block by block")
    if plugin.cpu_ram_efficient_loading:
        raise InputError("fsdp_cpu_ram_efficient_loading leaves the text encoders empty; set it to false")
    if plugin.activation_checkpointing:
        raise InputError("fsdp_activation_checkpointing: set it to false, and give --gradient_checkpointing")
    return plugin


class ShardedBase:
    """The frozen weights of a backbone's denoiser, sharded in place; its LoRA, trainable or not, is left alone.

    From here on all processes must run the denoiser alike, call by call, but within `whole`.

    Raises:
        InputError: the launcher's settings name a kind of block that the denoiser does not have.
    """

    def __init__(self, backbone: Backbone, accelerator: Accelerator) -> None:
        denoiser, plugin = backbone.denoiser, read_plugin()
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        ignored = set(lora_parameters(backbone))
        self.reshard = bool(plugin.reshard_after_forward)
        for module in [*reversed(_blocks(denoiser, plugin.transformer_cls_names_to_wrap)), denoiser]:
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=self.reshard,
                offload_policy=plugin.cpu_offload,
                ignored_params=ignored,
            )
        self.units = [module for module in denoiser.modules() if isinstance(module, FSDPModule)]  # the root is first
        _run_once(backbone)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, every process holds all weights, so that each may run the denoiser as it likes."""
        root = self.units[0]
        root.set_reshard_after_forward(False)
        root.set_reshard_after_backward(False)
        for unit in self.units:
            unit.unshard()
        try:
            yield
        finally:
            root.set_reshard_after_forward(self.reshard)
            root.set_reshard_after_backward(True)
            self.settle()

    def settle(self) -> None:
        """Let go of what is borrowed; a pass that was left early at a tap has not done so itself."""
        self.units[0].reset_iter_state()
        for unit in self.units:
            unit.reshard()


@torch.no_grad()
def average_gradients(parameters: Collection[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean of every gradient over the processes, by one exchange; what has no gradient has none anywhere."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def _run_once(backbone: Backbone) -> None:
    """A small pass: FSDP finds its root and its streams in the first one, and `whole` may come before any other."""
    height, width = (side // backbone.vae_scale for side in backbone.image_size)
    noisy = torch.zeros(1, backbone.latent_channels, height, width, device=backbone.device)
    backbone.predict(noisy, torch.zeros(1, dtype=torch.long, device=backbone.device), backbone.null_text(1))


def _blocks(denoiser: nn.Module, names: Collection[str] | None) -> list[nn.Module]:
    """The modules that are borrowed each as one, outer before inner.

    Args:
        names: of their classes; None = those that the denoiser's own class says must not be split over devices.
    """
    own: Collection[str] = getattr(denoiser, "_no_split_modules", None) or ()
    there = {type(module).__name__ for module in denoiser.modules()}
    for name in names or ():
        if name not in there:
            raise InputError(
                f"fsdp_transformer_layer_cls_to_wrap: `{name}` (the launcher's) is no block of "
                f"{type(denoiser).__name__}; leave it out, or name some of {', '.join(sorted(there & set(own)))}"
            )
    return [module for module in denoiser.modules() if type(module).__name__ in (names or own)]
