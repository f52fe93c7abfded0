"""From a scene to pixels, at any size, anti-aliased."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dpt_t2i.scenes.world import Background, Scene, SceneObject

Floats = NDArray[np.floating[Any]]

SUPERSAMPLE = 4
SHADING = 0.05  # brightness falls by up to this share across an object


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Draw a scene as an RGB image of `size` x `size` pixels."""
    canvas = _ground(scene.background, size)
    for thing in scene.objects:
        alpha = _coverage(thing, size)[..., None]
        canvas = canvas * (1 - alpha) + _paint(thing, size) * alpha
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))


def _coverage(thing: SceneObject, size: int) -> Floats:
    """Share of each pixel [size, size] that the object covers, 0..1."""
    big = size * SUPERSAMPLE
    mask = Image.new("L", (big, big))
    ImageDraw.Draw(mask).polygon([(x * big - 0.5, y * big - 0.5) for x, y in thing.outline], fill=255)
    return np.asarray(mask.reduce(SUPERSAMPLE), dtype=np.float32) / 255


def _paint(thing: SceneObject, size: int) -> Floats:
    """The object's shade, a little darker towards its lower right; [size, size, 3]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    slope = ((axis[None, :] - thing.cx) + (axis[:, None] - thing.cy)) / (2 * thing.extent)
    light = 1 - SHADING * np.clip(slope + 0.5, 0, 1)
    return light[..., None] * np.array(thing.rgb, dtype=np.float32)


def _ground(ground: Background, size: int) -> Floats:
    """Background [size, size, 3], 0..255: how far each pixel lies between the two shades."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    turn = math.radians(ground.angle)
    along = math.cos(turn) * axis[None, :] + math.sin(turn) * axis[:, None]
    if ground.kind == "flat":
        mix: Floats = np.zeros((size, size), dtype=np.float32)
    elif ground.kind == "gradient":
        mix = np.clip(along + 0.5, 0, 1)
    elif ground.kind == "stripes":
        mix = 0.5 + 0.5 * np.sin(2 * math.pi * (5 * along + ground.seed % 97 / 97))
    else:
        lattice = np.random.default_rng(ground.seed).random((6, 6), dtype=np.float32)
        clouds = Image.fromarray((255 * lattice).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        mix = np.asarray(clouds, dtype=np.float32) / 255
    first, second = (np.array(rgb, dtype=np.float32) for rgb in (ground.first, ground.second))
    return first + mix[..., None].astype(np.float32) * (second - first)
