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

"""Split a cohort into training, validation and test by patient, so that nobody is on two sides."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["checked_patient_ids", "require_distinct_ids", "split_patients"]

# 7.0 is how a column of numbers with an empty cell in it comes out of many a program.
_DECIMALS = re.compile(r"(?<=\d)\.0+$")


def split_patients(
    patient_ids: Sequence[str], fractions: Mapping[str, float], *, seed: int
) -> dict[str, tuple[int, ...]]:
    """Place every patient, with all of the patient's rows, in one split.

    A patient's split depends on ``seed`` and on that patient's own id, and on nothing else: not on the order of the
    rows, nor on who else is in the cohort. This matters for two reasons:

    - Differential privacy compares a cohort with the same cohort plus or minus one patient. Were the split drawn by
      shuffling, that one patient would move many others between training and test, and the two training sets would
      differ in far more than one patient: the accounted guarantee would be about another comparison.
    - When the cohort grows, no patient whom a model has been tested on moves into training.

    The sizes of the splits are therefore random: each patient falls into a split with the probability given.

    Args:
        patient_ids: (N,) one id for each row; a patient may have many rows.
        fractions: name of each split to the expected fraction of patients in it, summing to 1. The order matters:
            the same fractions in another order make another split.
        seed: any integer. It need not be secret: a split is not a privacy mechanism.

    Returns:
        For each name in ``fractions``, in that order, the ascending indices of its rows. May be empty.

    Raises:
        ValueError: for fractions that are no probabilities, and for missing or non-text patient ids.
    """
    edges = _upper_edges(fractions)
    rows: dict[str, list[int]] = {name: [] for name in fractions}
    placed: dict[str, str] = {}
    for index, patient_id in enumerate(checked_patient_ids(patient_ids)):
        if patient_id not in placed:
            position = _position(patient_id, seed)
            placed[patient_id] = next(name for name, edge in edges if position < edge)
        rows[placed[patient_id]].append(index)
    return {name: tuple(indices) for name, indices in rows.items()}


def _position(patient_id: str, seed: int) -> float:
    """A number in [0, 1), uniform over ids, that only the seed and the id decide."""
    digest = hmac.new(f"monai_privacy split {seed}".encode(), patient_id.encode(), hashlib.sha256).digest()
    # 53 bits are what a float holds exactly; more could round up to 1.0, which lies in no split.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2.0**53


def _upper_edges(fractions: Mapping[str, float]) -> list[tuple[str, float]]:
    """Each split's upper edge in [0, 1], splits of fraction 0 left out."""
    for name, fraction in fractions.items():
        if not 0.0 <= fraction <= 1.0:  # also catches nan
            raise ValueError(
                f"fraction of split {name!r} is {fraction}, which is no probability. Give a number from 0 to 1."
            )
    total = sum(fractions.values())
    if abs(total - 1.0) > 1e-9:
        raise ValueError(
            f"fractions sum to {total:.6g}, not 1, so some patients would have no split or two. "
            f"Make {sorted(fractions)} sum to 1."
        )
    edges, edge = [], 0.0
    for name, fraction in fractions.items():
        edge += fraction
        if fraction > 0.0:
            edges.append((name, edge))
    # Rounding may leave the last edge just under 1; a patient beyond it would have no split.
    edges[-1] = (edges[-1][0], 1.0)
    return edges


def checked_patient_ids(patient_ids: Sequence[str]) -> Sequence[str]:
    """Return ``patient_ids``, or raise ValueError unless each is a text that is not blank and no two look like one."""
    # No message shows an id: it may name a person, and messages end up in logs.
    if isinstance(patient_ids, str):
        raise ValueError(
            f"patient_ids is one text of {len(patient_ids)} letters, each of which would count as a patient. "
            "Give a list with one id for each row."
        )
    for index, patient_id in enumerate(patient_ids):
        if not isinstance(patient_id, str):
            raise ValueError(
                f"patient_ids[{index}] is a {type(patient_id).__name__}, and 7 and '7' would be two patients. "
                "Convert the ids with str()."
            )
        if not patient_id.strip():
            raise ValueError(
                f"patient_ids[{index}] is empty, so the row belongs to nobody. Give every row its patient's id."
            )
    require_distinct_ids(patient_ids)
    return patient_ids


def require_distinct_ids(patient_ids: Iterable[str]) -> None:
    """Refuse ids of which two are one patient's as spreadsheets change them: "7" and "7.0", "P1" and " p1".

    Raises:
        ValueError: without the ids, which may name a person.
    """
    rows: dict[str, int] = {}
    seen: dict[str, str] = {}
    for row, patient_id in enumerate(patient_ids):
        first = seen.setdefault(_DECIMALS.sub("", patient_id.strip().casefold()), patient_id)
        if first != patient_id:
            raise ValueError(
                f"the patient ids of rows {rows[first]} and {row} differ in blanks, capitals or a decimal zero alone, as "
                "spreadsheets make two of one, and a patient under two ids is not protected. Write each patient in one way."
            )
        rows.setdefault(patient_id, row)
