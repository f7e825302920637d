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

"""The signed record of who is with which teacher: it names nobody, and the holder of its key can check ids."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_privacy.accounting.cohort import keyed_digest
from monai_privacy.data.splits import checked_patient_ids

__all__ = ["PartitionManifest", "TeacherShard", "checked_key", "derived_key", "read_manifest"]

VERSION = 1
_FORMAT = "monai_privacy partition of patients"
_SHORTEST_KEY = 16


@dataclass(frozen=True)
class TeacherShard:
    """What the manifest says about one teacher.

    Args:
        teacher: its number, counted from 0.
        num_rows: rows it learns from.
        num_patients: patients whom these rows are of.
        digests: keyed digest of each of these patients, sorted.
    """

    teacher: int
    num_rows: int
    num_patients: int
    digests: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class PartitionManifest:
    """Who is with which teacher, by keyed digests: whole and unchanged, or it cannot be read.

    It holds no patient id, and without the key nobody can tell whether a known id is in it. It does hold the exact
    sizes of the shards, which no guarantee covers: it stays with the hospitals.

    Args:
        num_teachers: number of teachers in all.
        teachers_per_patient: most teachers that one patient is in.
        hospitals: names in sorted order, each with the same number of teachers; empty where there was no such division.
        shards: one for each teacher, in order.
        signature: HMAC-SHA256 of all of the above, in hex.
        digest_key: what ids are digested with; derived from the partition's key, which cannot be had back from it.

    Raises:
        ValueError: from the constructor, as from :meth:`require_whole`.
    """

    num_teachers: int
    teachers_per_patient: int
    hospitals: tuple[str, ...]
    shards: tuple[TeacherShard, ...]
    signature: str = field(repr=False)
    digest_key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        self.require_whole()

    @classmethod
    def made(
        cls,
        teachers: Sequence[tuple[int, Iterable[str]]],
        *,
        teachers_per_patient: int,
        hospitals: tuple[str, ...],
        key: bytes,
    ) -> PartitionManifest:
        """Sign what each teacher has: its number of rows and the ids of its patients."""
        digest_key = derived_key(key, "digests")
        shards = []
        for teacher, (num_rows, patients) in enumerate(teachers):
            digests = tuple(sorted(keyed_digest(digest_key, patient) for patient in patients))
            shards.append(TeacherShard(teacher, num_rows, len(digests), digests))
        content = _content(len(shards), teachers_per_patient, hospitals, shards)
        return cls(len(shards), teachers_per_patient, hospitals, tuple(shards), _signature(content, key), digest_key)

    def as_dict(self) -> dict[str, Any]:
        """The manifest as it is written to a file, with its signature."""
        content = _content(self.num_teachers, self.teachers_per_patient, self.hospitals, self.shards)
        return content | {"signature": self.signature}

    def require_whole(self) -> None:
        """Refuse a manifest that contradicts itself.

        Raises:
            ValueError: for a teacher that is there twice or not at all, numbers that do not add up, and a patient with
                more teachers than ``teachers_per_patient``.
        """
        numbers = [shard.teacher for shard in self.shards]
        if numbers != list(range(self.num_teachers)):
            raise _broken(
                f"it lists teachers {_shortened(numbers)} where {self.num_teachers} teachers are numbered from 0, each once"
            )
        if self.hospitals and self.num_teachers % len(self.hospitals):
            raise _broken(f"{len(self.hospitals)} hospitals cannot have the same share of {self.num_teachers} teachers")
        for shard in self.shards:
            if len(shard.digests) != shard.num_patients:
                raise _broken(
                    f"teacher {shard.teacher} has {shard.num_patients} patients but {len(shard.digests)} digests of them"
                )
            if len(set(shard.digests)) != len(shard.digests):
                raise _broken(f"teacher {shard.teacher} has a patient twice")
            if shard.num_rows < shard.num_patients or (shard.num_rows and not shard.num_patients):
                raise _broken(
                    f"teacher {shard.teacher} has {shard.num_patients} patients with {shard.num_rows} rows in all, where "
                    "each patient has one or more"
                )
        places = Counter(digest for shard in self.shards for digest in shard.digests)
        most = max(places.values(), default=0)
        if most > self.teachers_per_patient:
            several = sum(count > self.teachers_per_patient for count in places.values())
            raise _broken(
                f"{several} patients are with up to {most} teachers, where teachers_per_patient is "
                f"{self.teachers_per_patient}"
            )

    def require_strangers(self, patient_ids: Sequence[str]) -> None:
        """Refuse images of patients whom a teacher has learnt from, a student's file among them.

        Ids are compared letter by letter: one that is written otherwise, "P 1" for "P1", is another patient.

        Args:
            patient_ids: (N,) one id for each row; a patient may have many rows.

        Raises:
            ValueError: where one of these patients is in the manifest, saying how many are; for missing or non-text ids.
        """
        known = {digest for shard in self.shards for digest in shard.digests}
        asked = set(checked_patient_ids(patient_ids))
        found = sum(keyed_digest(self.digest_key, patient) in known for patient in asked)
        if found:
            raise ValueError(
                f"{found} of {len(asked)} patients are among those whom the teachers learnt from: their images are not "
                "public, and the guarantee for their labels would not cover them. Take these patients out of the file."
            )


def read_manifest(path: str | os.PathLike[str], key: bytes) -> PartitionManifest:
    """Read a manifest that ``write_manifest`` wrote, and refuse it unless it is whole and unchanged.

    Args:
        path: the JSON file.
        key: the key that the patients were partitioned with.

    Raises:
        ValueError: for a file that is no manifest, an unknown version, a wrong signature, or contradictions.
        OSError: where the file cannot be read.
    """
    key = checked_key(key)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON, so no manifest. Give the file that write_manifest wrote.") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"{path} is no manifest of a partition. Give the file that write_manifest wrote.")
    if data.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {data.get('version')!r}, but this release reads version {VERSION}. Read it with the "
            "release that wrote it."
        )
    content = {name: value for name, value in data.items() if name != "signature"}
    # Before anything in it is believed.
    if not hmac.compare_digest(str(data.get("signature")).encode(), _signature(content, key).encode()):
        raise ValueError(
            f"{path} does not carry the signature of this key: it was changed, or made with another key. Give the key that "
            "the patients were partitioned with, or partition them again."
        )
    try:
        shards = tuple(
            TeacherShard(entry["teacher"], entry["rows"], entry["patients"], tuple(entry["digests"]))
            for entry in data["teachers"]
        )
        return PartitionManifest(
            num_teachers=data["num_teachers"],
            teachers_per_patient=data["teachers_per_patient"],
            hospitals=tuple(data["hospitals"]),
            shards=shards,
            signature=data["signature"],
            digest_key=derived_key(key, "digests"),
        )
    except (KeyError, TypeError) as error:
        raise _broken(f"an entry is missing or of another type ({error})") from error


def checked_key(key: bytes) -> bytes:
    """Return ``key``, or raise ValueError unless it is at least 16 bytes."""
    if not isinstance(key, bytes):
        raise ValueError(f"key is a {type(key).__name__}, not bytes. Make one with new_partition_key().")
    if len(key) < _SHORTEST_KEY:
        raise ValueError(
            f"key has {len(key)} bytes, fewer than {_SHORTEST_KEY}: it could be found by trying, and with it who is in "
            "which teacher. Make one with new_partition_key()."
        )
    return key


def derived_key(key: bytes, purpose: str) -> bytes:
    """A key for one purpose: neither ``key`` nor the key of another purpose can be had from it."""
    return hmac.new(key, f"monai_privacy partition {purpose}".encode(), hashlib.sha256).digest()


def _content(
    num_teachers: int, teachers_per_patient: int, hospitals: Sequence[str], shards: Iterable[TeacherShard]
) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "version": VERSION,
        "num_teachers": num_teachers,
        "teachers_per_patient": teachers_per_patient,
        "hospitals": list(hospitals),
        "teachers": [
            {
                "teacher": shard.teacher,
                "rows": shard.num_rows,
                "patients": shard.num_patients,
                "digests": list(shard.digests),
            }
            for shard in shards
        ],
    }


def _signature(content: Mapping[str, Any], key: bytes) -> str:
    # Sorted and without spaces: the same content gives the same bytes, however the file is laid out.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hmac.new(derived_key(key, "signature"), text.encode(), hashlib.sha256).hexdigest()


def _shortened(numbers: Sequence[object]) -> str:
    shown = ", ".join(str(number) for number in numbers[:5])
    return f"{shown}, ..." if len(numbers) > 5 else shown


def _broken(reason: str) -> ValueError:
    return ValueError(f"the manifest is not whole: {reason}. Partition the patients again.")
