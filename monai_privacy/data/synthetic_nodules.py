# Copyright (c) monai_privacy contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Drawing invented lung nodules in CT: the volumes of :mod:`monai_privacy.data.synthetic_ct`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LUNG_HU, _TISSUE_HU = -860.0, 40.0
_MIN_DIAMETER_MM, _MAX_DIAMETER_MM = 3.0, 30.0


@dataclass(frozen=True)
class Nodule:
    """What a nodule looks like.

    Args:
        label: 1 where it looks malignant: larger, spiculated, part-solid; benign ones are small, smooth, or calcified.
        diameter_mm: of the sphere of the same extent.
        spiculation: 0 (smooth) to 1 (many spikes).
        solidity: 0 (ground glass) to 1 (solid).
        calcified: whether there is chalk in it.
        at_wall: whether it lies at the chest wall.
    """

    label: int
    diameter_mm: float
    spiculation: float
    solidity: float
    calcified: bool
    at_wall: bool


def draw_attributes(rng: np.random.Generator, label: int | None = None) -> Nodule:
    """Draw what a nodule looks like, from what textbooks say of benign and malignant ones; the two overlap."""
    malignant = bool(rng.random() < 0.4) if label is None else bool(label)
    diameter = rng.lognormal(np.log(12.0 if malignant else 6.0), 0.42)
    return Nodule(
        label=int(malignant),
        diameter_mm=float(np.clip(diameter, _MIN_DIAMETER_MM, _MAX_DIAMETER_MM)),
        spiculation=float(rng.beta(2.0, 2.0) if malignant else rng.beta(1.0, 4.0)),
        solidity=float(rng.beta(3.0, 1.2)),
        calcified=bool(rng.random() < (0.02 if malignant else 0.2)),
        at_wall=bool(rng.random() < 0.3),
    )


def draw_nodule(
    nodule: Nodule, shape: Sequence[int], spacing_mm: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """A CT of a nodule in the middle of a box of lung.

    Args:
        nodule: what it looks like.
        shape: (3,) voxels along x, y, z.
        spacing_mm: (3,) of the voxels.
        rng: of everything else: vessels, wall, texture, noise.

    Returns:
        ``shape``, float32, HU.
    """
    x, y, z = _grid(shape, spacing_mm, rng)
    away = np.sqrt(x**2 + y**2 + z**2) + 1e-6
    volume = np.full(x.shape, _LUNG_HU) + rng.normal(0.0, 25.0)
    volume += rng.uniform(15.0, 45.0) * _texture(x, y, z, rng)
    tissue = _vessels(x, y, z, rng)
    if nodule.at_wall:
        tissue = np.maximum(tissue, _wall(x, y, z, nodule, rng))
    edge = _outline(x / away, y / away, z / away, nodule, rng) - away
    softness = rng.uniform(0.35, 0.7)
    body = _soft_step(edge / softness)
    density = -650.0 + 680.0 * nodule.solidity + rng.normal(0.0, 25.0)
    volume = volume + (_TISSUE_HU - volume) * tissue
    volume = volume + (np.maximum(density, volume) - volume) * body
    if 0.2 < nodule.solidity < 0.7:  # a solid core in ground glass
        core = _soft_step((0.28 * nodule.diameter_mm * nodule.solidity - away) / softness)
        volume = volume + (_TISSUE_HU - volume) * core
    if nodule.calcified:
        chalk = _soft_step((rng.uniform(0.2, 0.42) * nodule.diameter_mm - away) / softness)
        volume = volume + rng.uniform(250.0, 800.0) * chalk
    volume = volume + rng.normal(0.0, rng.uniform(12.0, 40.0), size=x.shape)
    return np.asarray(np.clip(volume, -1024.0, 1500.0), dtype=np.float32)


def _grid(
    shape: Sequence[int], spacing_mm: Sequence[float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Millimetres from the nodule's middle, which lies up to a voxel beside that of the box."""
    axes = [
        (np.arange(size) - (size - 1) / 2 + rng.uniform(-0.8, 0.8)) * spacing
        for size, spacing in zip(shape, spacing_mm, strict=True)
    ]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return x, y, z


def _outline(x: np.ndarray, y: np.ndarray, z: np.ndarray, nodule: Nodule, rng: np.random.Generator) -> np.ndarray:
    """The radius in each direction (x, y, z of length 1): an egg with lobes and spikes."""
    radius = np.full(x.shape, nodule.diameter_mm / 2.0)
    stretch = rng.uniform(0.82, 1.2, size=3)
    radius *= 1.0 / np.sqrt((x / stretch[0]) ** 2 + (y / stretch[1]) ** 2 + (z / stretch[2]) ** 2)
    for _ in range(3):
        lobe = rng.normal(size=3)
        radius *= 1.0 + 0.10 * nodule.spiculation * np.sin(2.5 * (x * lobe[0] + y * lobe[1] + z * lobe[2]))
    for _ in range(rng.poisson(14.0 * nodule.spiculation**1.5)):
        spike = _direction(rng)
        angle = 1.0 - (x * spike[0] + y * spike[1] + z * spike[2])
        length = rng.uniform(0.15, 0.45) * nodule.diameter_mm
        radius += length * np.exp(-angle / rng.uniform(0.012, 0.05))
    return radius


def _vessels(x: np.ndarray, y: np.ndarray, z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Share of tissue, 0 to 1: tubes that pass at some distance, and now and then end in the nodule."""
    tissue = np.zeros(x.shape)
    for _ in range(rng.poisson(3.0)):
        along = _direction(rng)
        offset = _direction(rng) * rng.exponential(9.0)
        dx, dy, dz = x - offset[0], y - offset[1], z - offset[2]
        way = dx * along[0] + dy * along[1] + dz * along[2]
        beside = np.sqrt(np.maximum(dx**2 + dy**2 + dz**2 - way**2, 0.0))
        width = rng.uniform(0.4, 1.8) * np.clip(1.0 - 0.02 * way, 0.4, 1.6)
        tissue = np.maximum(tissue, rng.uniform(0.5, 1.0) * _soft_step((width - beside) / 0.45))
    return tissue


def _wall(x: np.ndarray, y: np.ndarray, z: np.ndarray, nodule: Nodule, rng: np.random.Generator) -> np.ndarray:
    """Share of tissue of the chest wall, which touches the nodule; ribs run in it."""
    outward = _direction(rng) * np.array([1.0, 1.0, 0.25])
    outward /= np.linalg.norm(outward)
    beyond = x * outward[0] + y * outward[1] + z * outward[2] - rng.uniform(0.25, 0.75) * nodule.diameter_mm
    bend = 0.012 * (x**2 + y**2 + z**2 - beyond**2)
    return _soft_step((beyond + bend) / 0.6) * rng.uniform(0.9, 1.15)


def _texture(x: np.ndarray, y: np.ndarray, z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Slow waves, for the fine vessels and the breath that no slice shows singly."""
    waves = np.zeros(x.shape)
    for _ in range(6):
        k = _direction(rng) * rng.uniform(0.4, 1.6)
        waves += np.sin(k[0] * x + k[1] * y + k[2] * z + rng.uniform(0.0, 2 * np.pi))
    return waves / 2.0


def _direction(rng: np.random.Generator) -> np.ndarray:
    way = rng.normal(size=3)
    return np.asarray(way / np.linalg.norm(way))


def _soft_step(value: np.ndarray) -> np.ndarray:
    """0 to 1 around 0."""
    return np.asarray(0.5 * (1.0 + np.tanh(value)))
