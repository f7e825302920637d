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
"""What is asked of a bundle, and what was found in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from monai_privacy.accounting.values import checked_count, checked_delta, checked_positive

__all__ = ["Finding", "PrivacyRequest", "Verdict"]

#: private: is as it should be; changed: the overlay changes it; unnoised: leaves without noise, and the report names it;
#: noted: to be known; asked: only the user knows; refused: cannot be made private.
Verdict = Literal["private", "changed", "unnoised", "noted", "asked", "refused"]


@dataclass(frozen=True)
class Finding:
    """One thing about a bundle, in words, and what an overlay does about it.

    Args:
        verdict: see ``Verdict``.
        where: config id; empty for the bundle as a whole.
        what: what was found, and why it matters.
        remedy: what to do, where there is something to do.
        changes: config ids and values that the training's overlay sets.
        network: whether the changes are about the network, which evaluation, inference and export share.
    """

    verdict: Verdict
    where: str
    what: str
    remedy: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    network: bool = False


@dataclass(frozen=True, kw_only=True)
class PrivacyRequest:
    """What a private training of a bundle is to be.

    Args:
        epsilon: to stay below.
        delta: of the guarantee; where None, 1e-5, or less where that is not well below one over the number of patients.
        num_patients: number of units in training, public; counted from the records where None.
        expected_batch_size: units that a step draws on average; a quarter of them where None.
        max_grad_norm: the clipping norm.
        unit: "patient", or "image", which protects single images only.
        patient_key: of the patient's id in the records.
        patient_table: a CSV with the columns file and patient_id, where records have no id.
        patient_pattern: a regular expression whose group ``patient`` (or first group) is the id in the image's file name.
        image_key: of the image's file name in the records, for table and pattern.
        batch_norm: "group" replaces batch norm, for training from scratch; "fold" keeps what it learnt.
        public_weights: for "fold": the checkpoint whose batch-norm statistics you declare to be public.
        sampler: "refuse" or "drop" a sampler that draws some records more often than others.
        ledger: file of the cohort's ledger; ``ledger.jsonl`` in the bundle's folder where None.
    """

    epsilon: float = 8.0
    delta: float | None = None
    num_patients: int | None = None
    expected_batch_size: int | None = None
    max_grad_norm: float = 1.0
    unit: Literal["patient", "image"] = "patient"
    patient_key: str = "patient_id"
    patient_table: Path | None = None
    patient_pattern: str | None = None
    image_key: str = "image"
    batch_norm: Literal["group", "fold"] = "group"
    public_weights: Path | None = None
    sampler: Literal["refuse", "drop"] = "refuse"
    ledger: str | None = None

    def __post_init__(self) -> None:
        checked_positive("epsilon", self.epsilon)
        checked_positive("max_grad_norm", self.max_grad_norm)
        if self.delta is not None:
            checked_delta(self.delta)
        for name in ("num_patients", "expected_batch_size"):
            if getattr(self, name) is not None:
                checked_count(name, getattr(self, name))
        for name, allowed in (
            ("unit", ("patient", "image")), ("batch_norm", ("group", "fold")), ("sampler", ("refuse", "drop"))
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but it must be {' or '.join(allowed)}.")
        if self.patient_table is not None and self.patient_pattern is not None:
            raise ValueError("patient_table and patient_pattern are both given: which names the patients? Give one.")
        if self.patient_table is not None and not self.patient_table.is_file():
            raise ValueError(f"{self.patient_table} is no file: name the CSV that says whose the images are.")
        try:
            re.compile(self.patient_pattern or "")
        except re.error as error:
            raise ValueError(
                f"{self.patient_pattern!r} is no regular expression ({error}): correct patient_pattern."
            ) from error
        if self.batch_norm == "fold" and self.public_weights is None:
            raise ValueError(
                "batch_norm is 'fold' without public_weights: folded statistics become released weights, and those of "
                "private patients were never noised. Name the checkpoint whose statistics are public, or take 'group'."
            )
