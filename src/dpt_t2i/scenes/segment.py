"""From pixels to things: which pixels stand out from the calm ground, which belong together, and how much of each
pixel a thing covers.

An edge pixel is a mixture of ground and shade, and a thing's coverage is linear in it: blur moves coverage about but
keeps its sum. That is why the reading stands up to anti-aliasing, to an autoencoder and to changes of size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dpt_t2i.scenes.world import COLORS

Floats = NDArray[np.float32]


def hue_of(pixels: Floats) -> Floats:
    """Hue of RGB [..., 3]: the angle around the grey axis in degrees, 0 <= hue < 360; 0 where there is none."""
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    hue: Floats = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    return hue


HUED = tuple(name for name, rgb in COLORS.items() if np.ptp(rgb) > 50)
HUES = hue_of(np.array([COLORS[name] for name in HUED], dtype=np.float32))  # degrees
CHROMAS = np.array([np.ptp(COLORS[name]) for name in HUED], dtype=np.float32)  # largest channel less the least
BLACK, WHITE = (float(np.mean(COLORS[name])) for name in ("black", "white"))

GROUND_CHROMA = 32  # a ground has at most 19 (saturation 0.1, value 0.74); the rest is for noise and tint
GROUND_VALUE = (92, 204)  # a ground has 107 to 189
LEAST_GROUND = 0.25  # of the image; what has less is no scene
GROUND_BLUR = 0.05  # sigma, fraction of the side: a stripe is 0.2 wide, so its brightness is followed half-way
DULL = 40  # chroma below which a bright or dark pixel is white or black
THIN = 0.02  # inscribed radius, fraction of the side; the thinnest real part is the small cross's arm, 0.040
SPECK = 0.004  # area of a core, fraction of the image; the smallest real thing, a small triangle, has 0.028
REACH = 0.04  # how far beyond its core a thing's edge is looked for, fraction of the side


@dataclass(frozen=True)
class Region:
    """One thing: its shade and the share of each pixel that it covers, in a window around it."""

    coverage: Floats  # [h, w], 0..1
    left: int  # pixels: where the window stands in the image
    top: int
    shade: Floats  # [3], 0..255
    ground: Floats  # [3], 0..255: behind it, on average


def regions(pixels: Floats) -> list[Region]:
    """The things in an image [side, side, 3] of 0..255, largest first. Slivers and specks are none."""
    side = len(pixels)
    ground = ground_of(pixels)
    if ground is None:
        return []
    cores, labels, depth = _cores(classes_of(pixels, ground), side)
    if not cores:
        return []
    reach = max(2.5, REACH * side)
    distance, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    owner = np.where(distance <= reach, labels[rows, columns], 0)
    windows = ndimage.find_objects(owner)
    found = [_region(pixels, ground, owner == label, depth, windows[label - 1]) for label in cores]
    return sorted(found, key=lambda region: -float(region.coverage.sum()))


def firm(share: Floats) -> Floats:
    """Coverage without its outer tenths: they are noise, the ground's pattern and the shading across the thing."""
    return np.clip((share - 0.1) / 0.8, 0, 1)


def ground_of(pixels: Floats) -> Floats | None:
    """The ground behind each pixel [side, side, 3]: greyish pixels, spread over what hides it; None if few."""
    value, chroma = _value_and_chroma(ndimage.uniform_filter(pixels, (3, 3, 1)))  # grain is no colour
    grey = (chroma <= GROUND_CHROMA) & (value >= GROUND_VALUE[0]) & (value <= GROUND_VALUE[1])
    clean = ndimage.binary_erosion(grey, np.ones((3, 3)), border_value=1)  # a mixed edge pixel can look grey
    if clean.mean() < LEAST_GROUND:
        return None
    middle = pixels[clean].mean(axis=0)
    layers = np.concatenate([(pixels - middle) * clean[..., None], clean[..., None]], axis=-1, dtype=np.float32)
    sigma = GROUND_BLUR * len(pixels)
    spread = ndimage.gaussian_filter(layers, (sigma, sigma, 0), truncate=3.0)
    ground: Floats = middle + spread[..., :3] / (spread[..., 3:] + 1e-3)
    return ground


def classes_of(pixels: Floats, ground: Floats) -> NDArray[np.int8]:
    """For each pixel that is more thing than ground: 1 + index in HUED, or 1 + len(HUED) black, 2 + len(HUED) white."""
    _, chroma = _value_and_chroma(pixels)
    apart = np.abs(hue_of(pixels)[..., None] - HUES)
    nearest = np.minimum(apart, 360 - apart).argmin(axis=-1)
    light, behind = pixels.mean(axis=-1), ground.mean(axis=-1)
    return np.select(
        [
            chroma > 0.5 * CHROMAS[nearest],
            (chroma < DULL) & (light < 0.5 * (behind + BLACK)),
            (chroma < DULL) & (light > 0.5 * (behind + WHITE)),
        ],
        [1 + nearest, np.full_like(nearest, 1 + len(HUED)), np.full_like(nearest, 2 + len(HUED))],
        default=0,
    ).astype(np.int8)


def _value_and_chroma(pixels: Floats) -> tuple[Floats, Floats]:
    """Largest channel, and largest less least (`max(axis=-1)` is ten times slower on an axis of three)."""
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    value = np.maximum(np.maximum(red, green), blue)
    return value, value - np.minimum(np.minimum(red, green), blue)


def _cores(classes: NDArray[np.int8], side: int) -> tuple[list[int], NDArray[np.int32], Floats]:
    """Labels of the cores, the image of labels, and how deep inside its core each pixel lies (pixels)."""
    labels = np.zeros(classes.shape, dtype=np.int32)
    depth = np.zeros(classes.shape, dtype=np.float32)
    cores: list[int] = []
    for part, window in _parts(classes):
        if part.sum() < SPECK * side * side:
            continue
        inside = ndimage.distance_transform_edt(np.pad(part, 1))[1:-1, 1:-1]
        if inside.max() - 0.5 < THIN * side:
            continue
        cores.append(len(cores) + 1)
        labels[window][part] = cores[-1]
        depth[window][part] = inside[part]
    return cores, labels, depth


def _parts(classes: NDArray[np.int8]) -> Iterator[tuple[NDArray[np.bool_], tuple[slice, slice]]]:
    """Connected pixels of one class, each as a mask in its window."""
    for kind in np.flatnonzero(np.bincount(classes.ravel())[1:]) + 1:
        labels, _ = ndimage.label(classes == kind)
        for label, window in enumerate(ndimage.find_objects(labels), start=1):
            yield labels[window] == label, window


def _region(
    pixels: Floats, ground: Floats, mine: NDArray[np.bool_], depth: Floats, window: tuple[slice, slice]
) -> Region:
    mine, behind = mine[window], ground[window]
    inside = np.where(mine, depth[window], 0)
    shade = np.median(pixels[window][inside >= 0.6 * inside.max()], axis=0)
    span = shade - behind
    share = ((pixels[window] - behind) * span).sum(axis=-1) / np.maximum((span * span).sum(axis=-1), 1.0)
    return Region(
        coverage=(firm(share) * mine).astype(np.float32),
        left=window[1].start,
        top=window[0].start,
        shade=shade.astype(np.float32),
        ground=behind[mine].mean(axis=0),
    )
