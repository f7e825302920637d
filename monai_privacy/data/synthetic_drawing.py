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

"""Drawing invented patients and their chest X-rays: the pictures of :mod:`monai_privacy.data.synthetic`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_IMAGES_A_PATIENT = (0.60, 0.20, 0.10, 0.06, 0.04)  # chance of 1, 2, ... 5 images
# numpy takes [seed, number] and [seed, number, 0] for the same seed: without these, a patient's first image would
# repeat the draws of the patient's anatomy.
_STREAM_PATIENT, STREAM_IMAGE, _STREAM_LABEL = 1, 2, 3


@dataclass(frozen=True)
class _Anatomy:
    """What all images of one patient share. Lengths are in half image widths, sides are those of the picture."""

    chest_width: float
    chest_height: float
    tissue: float
    lung_air: float
    lung_gap: float
    lung_slant: float
    lung_top: float
    diaphragm: tuple[float, float]
    heart_x: float
    heart_y: float
    heart_width: float
    heart_height: float
    heart_density: float
    mediastinum_width: float
    ribs: int
    rib_phase: float
    rib_slope: float
    rib_density: float
    vessels: float
    texture_seed: int


@dataclass(frozen=True)
class _Opacity:
    """One patch of pneumonia, at a place inside a lung (x, y in -1..1 of that lung)."""

    side: int
    x: float
    y: float
    radius: float
    stretch: float
    density: float


@dataclass(frozen=True)
class Patient:
    number: int
    label: int
    sex: str
    age_years: int
    anatomy: _Anatomy
    opacities: tuple[_Opacity, ...]
    images: int


def draw_patients(num_patients: int, seed: int) -> Iterator[Patient]:
    for number in range(num_patients):
        rng = np.random.default_rng([seed, _STREAM_PATIENT, number])
        # Alternating pairs in random order: half of the patients are ill, whatever their number.
        first = int(np.random.default_rng([seed, _STREAM_LABEL, number // 2]).integers(2))
        label = first if number % 2 == 0 else 1 - first
        yield Patient(
            number=number,
            label=label,
            sex="F" if rng.random() < 0.5 else "M",
            age_years=int(rng.integers(1, 90)),
            anatomy=_draw_anatomy(rng),
            opacities=_draw_opacities(rng) if label else (),
            images=1 + int(rng.choice(len(_IMAGES_A_PATIENT), p=_IMAGES_A_PATIENT)),
        )


def _draw_anatomy(rng: np.random.Generator) -> _Anatomy:
    between = rng.uniform
    diaphragm = between(0.42, 0.60)
    return _Anatomy(
        chest_width=between(0.80, 0.97),
        chest_height=between(0.92, 1.05),
        tissue=between(0.85, 1.15),
        lung_air=between(0.42, 0.58),
        lung_gap=between(0.10, 0.17),
        lung_slant=between(0.10, 0.22),
        lung_top=between(-0.80, -0.66),
        # The liver lifts the dome on the picture's left.
        diaphragm=(diaphragm - between(0.03, 0.10), diaphragm),
        heart_x=between(0.08, 0.16),
        heart_y=between(0.22, 0.34),
        heart_width=between(0.22, 0.32),
        heart_height=between(0.26, 0.36),
        heart_density=between(0.34, 0.50),
        mediastinum_width=between(0.11, 0.17),
        ribs=int(rng.integers(8, 11)),
        rib_phase=between(0.0, 1.0),
        rib_slope=between(0.15, 0.40),
        rib_density=between(0.07, 0.15),
        vessels=between(0.16, 0.36),
        texture_seed=int(rng.integers(2**31)),
    )


def _draw_opacities(rng: np.random.Generator) -> tuple[_Opacity, ...]:
    # From one faint patch, no stronger than what vessels and ribs do in healthy lungs, to consolidation of both.
    severity = rng.beta(2.2, 1.6)
    return tuple(
        _Opacity(
            side=int(rng.integers(2)),
            x=rng.uniform(-0.5, 0.5),
            y=rng.uniform(-0.40, 0.65),
            radius=rng.uniform(0.13, 0.22) * (0.75 + 0.75 * severity),
            stretch=rng.uniform(0.7, 1.4),
            density=rng.uniform(0.15, 0.22) + 0.26 * severity,
        )
        for _ in range(1 + int(rng.binomial(4, 0.10 + 0.55 * severity)))
    )


# ------------------------------------------------------------------ pictures


def draw_picture(patient: Patient, view: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """One picture: (size, size) floats in 0..1, rows by columns, bone bright."""
    body = patient.anatomy
    column, row = _grid(size)
    x, y = _standing(column, row, rng)
    breath = rng.normal(0.0, 0.03)
    enlarge = 1.12 if view == "AP" else 1.0  # the heart lies farther from the detector
    texture = np.random.default_rng(body.texture_seed)

    chest = _soft_step((1.0 - (np.abs(x) / body.chest_width) ** 4 - (np.abs(y - 0.15) / 1.35) ** 6) * 3.0)
    shoulders = _soft_step((np.abs(x) * 0.55 - y - 1.02) * -12.0)
    picture = body.tissue * (0.62 * chest * shoulders + 0.10)

    lungs = [_lung(x, y, body, side, breath) for side in (0, 1)]
    lung = np.maximum(lungs[0], lungs[1])
    picture -= body.lung_air * lung
    picture += _vessels(x, y, body, lung, texture, size)
    picture += _heart(x, y, body, enlarge) * (0.35 + 0.65 * lung)
    picture += _mediastinum(x, y, body)
    picture += _ribs(x, y, body, chest)
    picture += _clavicles(x, y, body)
    # Pus replaces air: however many opacities overlap, a filled lung is no denser than the tissue around it.
    filled = sum((_opacity(x, y, body, o, lungs[o.side], rng, size) for o in patient.opacities), np.zeros_like(x))
    picture += body.lung_air * np.tanh(filled / body.lung_air)
    picture += _distractions(x, y, lung, rng)
    return _expose(picture, column, row, size, rng)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Column and row of every pixel, each in -1..1."""
    axis = (np.arange(size) + 0.5) / size * 2.0 - 1.0
    column, row = np.meshgrid(axis, axis)
    return column, row


def _standing(column: np.ndarray, row: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The grid as the body sees it: a patient stands a little differently, nearer or farther, each time."""
    angle = rng.normal(0.0, 0.035)
    scale = rng.uniform(0.94, 1.10)
    column, row = column - rng.normal(0.0, 0.04), row - rng.normal(0.0, 0.04)
    x = (np.cos(angle) * column + np.sin(angle) * row) * scale
    y = (-np.sin(angle) * column + np.cos(angle) * row) * scale
    return x, y


def _lung_centre(body: _Anatomy, side: int) -> tuple[float, float, float, float]:
    """Centre and half axes of a lung's bounding box: x, y, width, height. Side 0 is the picture's left."""
    half_width = (body.chest_width - 0.10 - body.lung_gap) / 2.0
    centre = body.lung_gap + half_width
    half_height = (body.diaphragm[side] - body.lung_top) / 2.0
    return (-centre if side == 0 else centre), body.lung_top + half_height, half_width, half_height


def _lung(x: np.ndarray, y: np.ndarray, body: _Anatomy, side: int, breath: float) -> np.ndarray:
    centre_x, centre_y, half_width, half_height = _lung_centre(body, side)
    # The apex leans towards the midline, and the field widens downwards.
    height = (y - centre_y) / half_height
    lean = body.lung_slant * (-height) * (1.0 if side == 0 else -1.0)
    across = (x - centre_x - lean * half_width) / (half_width * (0.92 + 0.16 * height))
    field = 1.0 - np.abs(across) ** 2.6 - np.abs(np.minimum(height, 0.0)) ** 2.4
    dome = body.diaphragm[side] + breath + 0.16 * across**2 - 0.02
    sharpness = 9.0
    return _soft_step(field * sharpness) * _soft_step((dome - y) * 28.0)


def _heart(x: np.ndarray, y: np.ndarray, body: _Anatomy, enlarge: float) -> np.ndarray:
    """Two overlapping ovals: the left ventricle, whose apex points down and outwards, and the right atrium."""
    dx, dy = x - body.heart_x, y - body.heart_y
    along, across = dx * 0.80 + dy * 0.60, -dx * 0.60 + dy * 0.80
    width, height = body.heart_width * enlarge, body.heart_height * enlarge
    ventricle = (along / (1.25 * width)) ** 2 + (across / (0.78 * height)) ** 2
    atrium = ((dx + 0.14) / (0.62 * width)) ** 2 + ((dy - 0.02) / (0.85 * height)) ** 2
    shape = np.maximum(_soft_step((1.0 - ventricle) * 5.0), _soft_step((1.0 - atrium) * 5.0))
    return body.heart_density * shape


def _mediastinum(x: np.ndarray, y: np.ndarray, body: _Anatomy) -> np.ndarray:
    column = _soft_step((body.mediastinum_width - np.abs(x - 0.01)) * 26.0)
    vertebrae = 0.05 * np.cos(y * 24.0) * np.exp(-((x / 0.07) ** 2))
    knob = 0.16 * np.exp(-(((x - body.mediastinum_width) / 0.08) ** 2) - ((y + 0.28) / 0.10) ** 2)
    airway = -0.12 * np.exp(-((x / 0.04) ** 2)) * _soft_step((-0.25 - y) * 14.0)
    return 0.16 * column + vertebrae + knob + airway


def _ribs(x: np.ndarray, y: np.ndarray, body: _Anatomy, chest: np.ndarray) -> np.ndarray:
    """Posterior ribs fall outwards, the fainter anterior ones rise; both are brightest at the chest wall."""
    side = np.abs(x) / body.chest_width
    spacing = 1.55 / body.ribs
    posterior = (y + 0.85 - body.rib_slope * 0.9 * side**1.6 - 0.10 * np.sin(side * 3.1)) / spacing + body.rib_phase
    anterior = (y + 0.85 + body.rib_slope * 1.3 * side**1.4) / spacing * 0.95 + 0.5 + body.rib_phase
    band = np.clip(np.cos(2 * np.pi * posterior), -0.2, 1.0) + 0.4 * np.clip(np.cos(2 * np.pi * anterior), 0.0, 1.0)
    inside = chest * _soft_step((0.80 - y) * 10.0) * _soft_step((side - 0.10) * 20.0)
    return body.rib_density * band * inside * (0.65 + 0.6 * side**2)


def _clavicles(x: np.ndarray, y: np.ndarray, body: _Anatomy) -> np.ndarray:
    line = -0.66 - 0.22 * (np.abs(x) - 0.1) + 0.05 * np.sin(np.abs(x) * 6.0)
    reach = _soft_step((0.75 - np.abs(x)) * 14.0) * _soft_step((np.abs(x) - 0.10) * 30.0)
    return 1.6 * body.rib_density * np.exp(-(((y - line) / 0.045) ** 2)) * reach


def _vessels(
    x: np.ndarray, y: np.ndarray, body: _Anatomy, lung: np.ndarray, texture: np.random.Generator, size: int
) -> np.ndarray:
    """Branches that are thick at the hilum and fade outwards; the texture belongs to the patient."""
    from_hilum = np.hypot((np.abs(x) - 0.20) / 0.45, (y + 0.02) / 0.60)
    angle = np.arctan2(y + 0.02, np.abs(x) - 0.12)
    phases = texture.uniform(0.0, 2 * np.pi, size=(2, 3))
    branches = np.zeros_like(x)
    for index, frequency in enumerate((7.0, 11.0, 17.0)):
        phase = np.where(x < 0, phases[0, index], phases[1, index])
        branches += np.clip(np.cos(frequency * angle + phase + 2.0 * from_hilum), 0.3, 1.0) - 0.3
    hilum = np.exp(-(from_hilum**2) * 5.0)
    cloud = _clouds(size, 5.0, texture)
    return body.vessels * lung * (0.55 * hilum + 0.45 * branches * np.exp(-1.3 * from_hilum) + 0.10 * cloud)


def _opacity(
    x: np.ndarray,
    y: np.ndarray,
    body: _Anatomy,
    opacity: _Opacity,
    lung: np.ndarray,
    rng: np.random.Generator,
    size: int,
) -> np.ndarray:
    centre_x, centre_y, half_width, half_height = _lung_centre(body, opacity.side)
    dx = (x - centre_x - opacity.x * half_width) / (opacity.radius * opacity.stretch)
    dy = (y - centre_y - opacity.y * half_height) / (opacity.radius / opacity.stretch)
    ragged = 1.0 + 0.55 * _clouds(size, 6.0, rng)
    course = rng.uniform(0.8, 1.2)  # the disease comes and goes between a patient's images
    return opacity.density * course * np.exp(-0.5 * (dx**2 + dy**2)) * np.clip(ragged, 0.2, 2.0) * (0.12 + 0.88 * lung)


def _distractions(x: np.ndarray, y: np.ndarray, lung: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What healthy images have too: skin folds, scars, leads, breast shadows. None depends on the label."""
    extra = np.zeros_like(x)
    shadow = rng.uniform(0.0, 0.14)
    for side in (-1.0, 1.0):
        extra += shadow * np.exp(-(((x - side * 0.48) / 0.26) ** 2) - ((y - 0.42) / 0.22) ** 2)
    for _ in range(rng.poisson(0.8)):
        at_x, at_y = rng.uniform(-0.7, 0.7), rng.uniform(-0.6, 0.5)
        width = rng.uniform(0.03, 0.06)
        extra += rng.uniform(0.05, 0.25) * np.exp(-(((x - at_x) ** 2 + (y - at_y) ** 2) / width**2)) * lung
    if rng.random() < 0.2:
        slope, offset = rng.uniform(-0.8, 0.8), rng.uniform(-0.5, 0.5)
        extra += rng.uniform(0.08, 0.20) * np.exp(-(((y - slope * x - offset) / 0.022) ** 2))
    return extra


def _expose(
    picture: np.ndarray, column: np.ndarray, row: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """What tube, grid and detector add: scatter, uneven beam, contrast, noise, collimation."""
    picture = picture + rng.normal(0.0, 0.05) * column + rng.normal(0.0, 0.05) * row
    picture = _blur(picture, size / 110.0)
    # The detector's noise and a slow mottle, which at this size looks like faint disease.
    picture = picture + rng.normal(0.0, rng.uniform(0.015, 0.035), picture.shape)
    picture = picture + 0.022 * _clouds(size, 4.0, rng)
    low, high = np.quantile(picture, (0.01, 0.99))
    picture = np.clip((picture - low) / (high - low), -0.1, 1.1)
    picture = np.clip(picture + 0.1, 0.0, 1.2) / 1.2
    picture = picture ** rng.uniform(0.75, 1.35) * rng.uniform(0.65, 0.95) + rng.uniform(0.0, 0.08)
    if rng.random() < 0.25:
        open_width, open_height = rng.uniform(0.88, 1.0, size=2)
        picture = np.where((np.abs(column) > open_width) | (np.abs(row) > open_height), 0.01, picture)
    return np.clip(picture, 0.0, 1.0)


def _soft_step(value: np.ndarray) -> np.ndarray:
    """0 to 1 around 0."""
    return 0.5 * (1.0 + np.tanh(0.5 * value))


def _clouds(size: int, periods: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of mean about 0 and deviation 1, with about ``periods`` clouds across the picture."""
    noise = _blur(rng.normal(size=(size, size)), size / (2.5 * periods))
    return (noise - noise.mean()) / noise.std()


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of a square picture, sigma in pixels."""
    smoother = _smoother(len(picture), sigma)
    return smoother @ picture @ smoother.T


@lru_cache(maxsize=16)
def _smoother(size: int, sigma: float) -> np.ndarray:
    # A matrix product beats Fourier transforms at these sizes, and each row sums to 1, so that no edge darkens.
    offset = np.arange(size)[:, None] - np.arange(size)[None, :]
    weights = np.exp(-0.5 * (offset / sigma) ** 2)
    return weights / weights.sum(axis=1, keepdims=True)
