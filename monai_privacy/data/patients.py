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
"""Patients of records that carry no id: from a table, or from the names of the files."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_privacy.data.loading import PATIENT_KEY
from monai_privacy.data.tables import is_missing

__all__ = ["with_patient_ids"]


def with_patient_ids(
    records: Sequence[Mapping[str, Any]],
    *,
    pattern: str | None = None,
    table: str | os.PathLike[str] | None = None,
    image_key: str = "image",
    patient_key: str = PATIENT_KEY,
) -> list[dict[str, Any]]:
    """Give each record of a bundle's datalist the id of its patient.

    Args:
        records: of the dataset, before any transform.
        pattern: a regular expression that is searched in the name of the image's file, folders included; its group
            ``patient``, or else its first group, is the id.
        table: or a CSV with the columns ``file`` and ``patient_id``; a record's image is the line whose ``file`` is its
            path, or the end of its path by whole folder and file names.
        image_key: of the image's file (or list of files) in the records.
        patient_key: under which the id is put.

    Returns:
        Copies of the records.

    Raises:
        ValueError: where a record has an id already, or none is found for it. No message shows an id.
    """
    if (pattern is None) == (table is None):
        raise ValueError("exactly one of pattern and table tells the patients. Give one of them.")
    lookup = _Pattern(pattern) if pattern is not None else _Table(Path(table))  # type: ignore[arg-type]
    found = []
    for row, record in enumerate(records):
        if patient_key in record:
            raise ValueError(
                f"record {row} has {patient_key} already, and another id would be put in its place. Leave pattern and "
                "table out, or name another patient_key."
            )
        image = record.get(image_key)
        files = list(image) if isinstance(image, (list, tuple)) else [image]
        if not files or not all(isinstance(file, (str, os.PathLike)) for file in files):
            raise ValueError(
                f"record {row} has no file name under {image_key!r}, so nothing tells its patient. Name the key of the "
                "image's file by image_key."
            )
        patients = {lookup(Path(str(file)).as_posix(), row) for file in files}
        if len(patients) > 1:
            raise ValueError(
                f"the files of record {row} belong to {len(patients)} patients, and one record can be only one's. Correct "
                "the record, the pattern or the table."
            )
        found.append({**record, patient_key: patients.pop()})
    return found


class _Pattern:
    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression ({error}). Correct it.") from error
        if self._pattern.groups < 1:
            raise ValueError(
                f"pattern {pattern!r} has no group, so which part of a file name is the patient is unknown. Put that part "
                "in brackets, as in 'patient(\\d+)_'."
            )
        self._group: str | int = "patient" if "patient" in self._pattern.groupindex else 1

    def __call__(self, name: str, row: int) -> str:
        match = self._pattern.search(name)
        patient = match[self._group] if match else None
        if not patient:
            raise ValueError(
                f"the file name of record {row} does not match the pattern {self._pattern.pattern!r}, so the image cannot "
                "be protected with its patient. Correct the pattern, or use a table."
            )
        return patient


class _Table:
    def __init__(self, table: Path) -> None:
        self._name = str(table)
        self._patients: dict[tuple[str, ...], str] = {}
        try:
            with open(table, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file, restval=""))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"CSV {table} cannot be read ({error}). Save it as a UTF-8 CSV file.") from error
        for line, row in enumerate(rows, start=2):
            name, patient = (row.get("file") or "").strip(), (row.get("patient_id") or "").strip()
            if not name or is_missing(patient):
                raise ValueError(
                    f"line {line} of {table} lacks file or patient_id, by which images find their patient. Fill both in, "
                    "in columns of these names."
                )
            if self._patients.setdefault(_parts(name), patient) != patient:
                raise ValueError(
                    f"line {line} of {table} gives a file of an earlier line to another patient. Remove one of them."
                )

    def __call__(self, name: str, row: int) -> str:
        parts = _parts(name)
        # The longest ending wins: a/1.png and b/1.png are two images.
        for start in range(len(parts)):
            if parts[start:] in self._patients:
                return self._patients[parts[start:]]
        raise ValueError(
            f"the file of record {row} is not in {self._name}, so the image cannot be protected with its patient. Add a "
            "line for it."
        )


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in Path(name).as_posix().split("/") if part not in ("", "."))
