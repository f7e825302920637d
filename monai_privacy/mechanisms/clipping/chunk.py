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

"""A physical batch: some of a batch's rows, patients one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from monai_privacy.mechanisms.clipping.units import Units


@dataclass(frozen=True)
class Chunk:
    """Rows of a batch that are looked at together.

    Args:
        inputs: (R, ...).
        targets: (R, ...).
        rows: (R,) their numbers in the batch.
        weights: (R,) factors on their losses; ones where None.
        units: whose they are.
    """

    inputs: Tensor
    targets: Tensor
    rows: Tensor
    weights: Tensor | None
    units: Units


def chunks(
    batch: tuple[Tensor, Tensor], patient_index: Tensor, weights: Tensor | None, max_rows: int | None
) -> Iterator[Chunk]:
    """Divide a batch into chunks of at most ``max_rows`` rows, or one patient where they alone have more.

    Patients come in the order of ``unique(patient_index)``, and none is divided.

    Raises:
        ValueError: where batch and index do not fit together.
    """
    inputs, targets = batch
    _check(inputs, targets, patient_index)
    # One look at the index on the CPU; the images stay where they are.
    _, inverse, counts = patient_index.cpu().unique(return_inverse=True, return_counts=True)
    order = inverse.argsort(stable=True)
    in_order = bool((order[1:] > order[:-1]).all())
    start = 0
    for group in _groups(counts.tolist(), max_rows or len(order)):
        rows = order[start : start + sum(group)]
        at = slice(start, start + len(rows)) if in_order else rows.to(inputs.device)
        start += len(rows)
        yield Chunk(inputs[at], targets[at], rows, None if weights is None else weights[at], Units(tuple(group)))


def _groups(counts: list[int], max_rows: int) -> Iterator[list[int]]:
    """Whole patients in groups of about equal size: a small one at the end would be measured anew."""
    group: list[int] = []
    left, size = sum(counts), 0
    for count in counts:
        # What is left, in as few groups as could hold it.
        if group and (size * math.ceil(left / max_rows) >= left or size + count > max_rows):
            yield group
            group, left, size = [], left - size, 0
        group.append(count)
        size += count
    if group:
        yield group


def _check(inputs: Tensor, targets: Tensor, patient_index: Tensor) -> None:
    if patient_index.ndim != 1 or patient_index.is_floating_point():
        raise ValueError(
            f"patient_index has shape {tuple(patient_index.shape)} and dtype {patient_index.dtype}, but it must be one "
            "integer for each row."
        )
    if not len(inputs) == len(targets) == len(patient_index):
        raise ValueError(
            f"{len(inputs)} inputs, {len(targets)} targets and {len(patient_index)} patients: each row must belong to "
            "one patient. Give patient_index for each row that the network sees."
        )
