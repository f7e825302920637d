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

"""Give every patient to one teacher of a PATE ensemble, by a keyed hash of the patient's own id."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_privacy.accounting.values import checked_count
from monai_privacy.data.partition_manifest import PartitionManifest, checked_key, derived_key
from monai_privacy.data.splits import checked_patient_ids

__all__ = ["PatientPartition", "new_partition_key", "partition_patients", "write_manifest"]


@dataclass(frozen=True)
class PatientPartition:
    """Which rows each teacher learns from.

    Holds row numbers and keyed digests of patients, and neither their ids nor the key.

    Args:
        rows: for each teacher the ascending indices of its rows; may be empty.
        teachers_per_patient: most teachers that one patient may be in.
        hospitals: names in sorted order; each has the same number of sub-teachers, in this order. Empty where the
            cohort was not divided by hospital.
        signed: what :meth:`manifest` writes down.
    """

    rows: tuple[tuple[int, ...], ...]
    teachers_per_patient: int
    hospitals: tuple[str, ...]
    signed: PartitionManifest

    @property
    def num_teachers(self) -> int:
        """Number of teachers in all, of all hospitals, the empty ones included: each votes on every query."""
        return len(self.rows)

    @property
    def empty_teachers(self) -> tuple[int, ...]:
        """Teachers without a row. They must vote nevertheless, for a fixed class say: M is a public number."""
        return tuple(teacher for teacher, rows in enumerate(self.rows) if not rows)

    @property
    def teachers_of_hospitals(self) -> dict[str, tuple[int, ...]]:
        """For each hospital the numbers of its sub-teachers; empty where the cohort was not divided by hospital."""
        each = self.num_teachers // max(len(self.hospitals), 1)
        return {name: tuple(range(index * each, (index + 1) * each)) for index, name in enumerate(self.hospitals)}

    def manifest(self) -> dict[str, Any]:
        """The signed record of the partition, JSON-able; see :class:`PartitionManifest`."""
        return self.signed.as_dict()


def new_partition_key() -> bytes:
    """32 bytes from the operating system, for :func:`partition_patients`. Store them where nobody else reads."""
    return secrets.token_bytes(32)


def partition_patients(
    patient_ids: Sequence[str],
    num_teachers: int,
    *,
    key: bytes,
    teachers_per_patient: int = 1,
    hospitals: Sequence[str] | None = None,
) -> PatientPartition:
    """Place every patient, with all of the patient's rows, with one teacher (or with a declared number of them).

    A patient's teachers depend on ``key`` and on that patient's own id, and on nothing else: not on the order of the
    rows, nor on who else is in the cohort. Shuffled, balanced or stratified shards would not do: one patient more
    would move others between teachers, and many votes would change where the accounted guarantee allows one. The sizes
    of the shards are therefore random, and some may be empty (``empty_teachers``).

    Args:
        patient_ids: (N,) one id for each row; a patient may have many rows.
        num_teachers: number of teachers M; of each hospital, where ``hospitals`` is given.
        key: secret bytes, at least 16; see :func:`new_partition_key`. Whoever has it can compute where a known id is.
        teachers_per_patient: most teachers t that one patient may be in. Without ``hospitals`` each patient is in t
            of them: those with the smallest HMAC of teacher and id. With ``hospitals`` each patient is in one teacher
            of every hospital where the id occurs, and t bounds how many these may be.
        hospitals: (N,) the hospital of each row. Each hospital then has its own teachers, on its own patients: teacher
            ``number of the hospital in sorted order * num_teachers + hash``. Ids must be linked between hospitals
            beforehand: a patient with another id at another hospital counts as two patients.

    Returns:
        The rows of each teacher, and the signed manifest.

    Raises:
        ValueError: for a key that can be guessed, numbers that fit no partition, missing or non-text ids and hospitals,
            and for a patient at more hospitals than ``teachers_per_patient``.

    Guarantee: adding or removing one patient changes the rows of at most t teachers. One vote of each costs α/σ² in
        RDP of order α (GNMax) at t = 1, and α·t²/σ² at t. Which hospitals take part is taken to be public.
    Reference: Papernot et al. 2017 (arXiv:1610.05755), section 2.1; Papernot et al. 2018 (arXiv:1802.08908),
        Proposition 8.
    """
    ids = checked_patient_ids(patient_ids)
    key = checked_key(key)
    num_teachers = checked_count("num_teachers", num_teachers)
    limit = checked_count("teachers_per_patient", teachers_per_patient)
    homes = None if hospitals is None else _checked_hospitals(hospitals, len(ids))
    names = () if homes is None else tuple(sorted(set(homes)))
    _require_room(ids, homes, limit, num_teachers)

    placement = derived_key(key, "placement")
    within = {patient: _teachers_of(placement, patient, num_teachers, 1 if names else limit) for patient in set(ids)}
    first = {name: index * num_teachers for index, name in enumerate(names)}
    rows: list[list[int]] = [[] for _ in range(num_teachers * max(len(names), 1))]
    for index, patient in enumerate(ids):
        offset = 0 if homes is None else first[homes[index]]
        for teacher in within[patient]:
            rows[offset + teacher].append(index)
    placed = tuple(tuple(one) for one in rows)
    signed = PartitionManifest.made(
        [(len(one), {ids[index] for index in one}) for one in placed],
        teachers_per_patient=limit,
        hospitals=names,
        key=key,
    )
    return PatientPartition(placed, limit, names, signed)


def write_manifest(partition: PatientPartition, path: str | os.PathLike[str]) -> Path:
    """Write the manifest of ``partition`` as JSON, whole or not at all, and return its path."""
    target = Path(path)
    # Half a list would let the patients of the other half pass for strangers.
    partial = target.with_name(target.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(partition.manifest(), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target)
    return target


def _teachers_of(key: bytes, patient_id: str, num_teachers: int, count: int) -> tuple[int, ...]:
    """The ``count`` teachers of a patient, which the key and the id alone decide."""
    if count == 1:
        # 256 bits: the modulus favours no teacher by more than num_teachers / 2**256.
        return (int.from_bytes(_hmac(key, patient_id.encode()), "big") % num_teachers,)
    # The teacher first, in a fixed width: "1" beside "12" must not be the same text as "11" beside "2".
    ranked = sorted(range(num_teachers), key=lambda one: _hmac(key, one.to_bytes(8, "big") + patient_id.encode()))
    return tuple(ranked[:count])


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()


def _checked_hospitals(hospitals: Sequence[str], num_rows: int) -> Sequence[str]:
    if isinstance(hospitals, str):
        raise ValueError(
            f"hospitals is one text of {len(hospitals)} letters, each of which would count as a hospital. Give a list "
            "with one name for each row."
        )
    if len(hospitals) != num_rows:
        raise ValueError(f"hospitals has {len(hospitals)} entries for {num_rows} rows. Give the hospital of each row.")
    if not num_rows:
        raise ValueError("hospitals is empty, so there is no hospital to have a teacher. Give rows, or leave it out.")
    bad = next((index for index, name in enumerate(hospitals) if not isinstance(name, str) or not name.strip()), None)
    if bad is not None:
        raise ValueError(
            f"hospitals[{bad}] is {hospitals[bad]!r}, which is no name, so the row belongs to no hospital. Give every row "
            "the name of its hospital."
        )
    return hospitals


def _require_room(ids: Sequence[str], homes: Sequence[str] | None, limit: int, num_teachers: int) -> None:
    if homes is None:
        if limit > num_teachers:
            raise ValueError(
                f"teachers_per_patient is {limit}, above num_teachers {num_teachers}: there are not so many. Lower it to 1 "
                "unless patients must overlap."
            )
        return
    places = Counter(patient for patient, _ in set(zip(ids, homes, strict=True)))
    several = sum(count > limit for count in places.values())
    if several:
        most = max(places.values())
        raise ValueError(
            f"{several} patients occur at more hospitals than teachers_per_patient {limit}, one of them at {most}: the "
            f"guarantee would be for less than a patient. Pass teachers_per_patient={most}, which costs up to {most}² "
            "times, or keep each patient at one hospital."
        )
