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
"""Read CT volumes with a yes-or-no label, and their patients: series of DICOM files or NIfTI, and a table."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel

from monai_privacy.data.dicom_series import CTSeries, read_ct_series
from monai_privacy.data.image_files import image_format, one_line
from monai_privacy.data.source import ImageSource, Record
from monai_privacy.data.synthetic import NIFTI_DESCRIPTION
from monai_privacy.data.tables import (
    FILE_COLUMNS,
    LabelRow,
    LayoutError,
    named_path,
    only_table,
    patient_of,
    read_labels,
)

__all__ = ["CENTER_KEY", "read_ct_volumes"]

CENTER_KEY = "center"
_SERIES_COLUMNS = ("series_uid", "seriesuid", "seriesinstanceuid")
_CENTER_COLUMNS = ("coordx", "coordy", "coordz")  # as the LUNA16 challenge names them


def read_ct_volumes(
    source: str | os.PathLike[str], *, label_column: str | None = None, strict: bool = False
) -> ImageSource:
    """Read a folder of CT volumes with exactly one CSV that names them; pixels stay unread.

    A line of the CSV names, in a column ``file`` (or ``filename``, ``image``, ``path``; relative to the CSV), a NIfTI
    file, a DICOM file, or a folder that holds one series; or, in a column ``series_uid``, a SeriesInstanceUID. The patient
    is the column ``patient_id``, or else DICOM's PatientID. Columns ``coordX, coordY, coordZ`` (millimetres in the
    patient, as DICOM has them: to the left, back and head) give the place of a finding; a volume may then be named once
    for each of its findings. DICOM series are grouped and ordered as ``read_ct_series`` says.

    A volume that cannot be read is left out, with a notice that names it, unless ``strict``; a line without label or
    patient, or that names nothing, ends the reading.

    Args:
        source: the folder.
        label_column: the column of labels, 0 or 1; "label" or "target" where None.
        strict: raise for the first file that cannot be read or used.

    Raises:
        FileNotFoundError: if ``source`` does not exist.
        ValueError: for anything that cannot be used; the message names the file, the reason and the remedy.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        raise FileNotFoundError(
            f"source {folder} does not exist. Check the path, and download or mount the data first."
        )
    if not folder.is_dir():
        raise LayoutError(f"source {folder} is a file, not a folder of CT volumes with a CSV. Name the folder.")
    if not any(folder.rglob("*.[cC][sS][vV]")):
        raise LayoutError(
            f"folder {folder} has no CSV, so labels and volumes are unknown. Add one with the columns file (or "
            "series_uid), label and patient_id."
        )
    rows = read_labels(only_table(folder), file_columns=(*FILE_COLUMNS, *_SERIES_COLUMNS), label_column=label_column)
    found = _Volumes(folder, strict)
    records = [record for row in rows if (record := found.record(row)) is not None]
    labels = {record["label"] for record in records}
    if len(labels) < 2:
        raise LayoutError(
            f"{len(records)} volumes of {folder} can be used, of {len(labels)} classes, and nothing tells one class from "
            f"none. Give volumes of both classes, 0 and 1.{''.join(f' Left out: {text}' for text in found.notices[:3])}"
        )
    return ImageSource(
        "dicom" if found.has_dicom else "nifti",
        tuple(records),
        has_patient_ids=True,
        synthetic=found.all_synthetic,
        kind="CT volumes",
        notices=tuple(found.notices),
    )


class _Volumes:
    """The volumes of a folder, found as the lines of its table ask for them."""

    def __init__(self, folder: Path, strict: bool) -> None:
        self.notices: list[str] = []
        self.has_dicom = False
        self.all_synthetic = True
        self._folder = folder
        self._strict = strict
        self._seen: dict[tuple[str, tuple[float, ...]], int] = {}
        self._series: tuple[CTSeries, ...] | None = None
        self._owners: dict[str, str] = {}

    def record(self, row: LabelRow) -> Record | None:
        """The record of a line; None, and a notice, where its volume cannot be used."""
        center = _center(row)
        images: str | list[str]
        by_uid = next((name for name in row.cells if name.strip().lower() in _SERIES_COLUMNS), None)
        path = None if by_uid else named_path(row, {}, folders=True)
        try:
            if path is not None and path.is_file() and image_format(path) == "nifti":
                self.all_synthetic &= _is_synthetic_nifti(path)
                images, name, from_dicom = str(path), path, None
                sources = [os.path.realpath(path)]
            else:
                series = self._find(row, path)
                name, from_dicom = series.files[0], series.patient_id
                images = [str(file) for file in series.files] if len(series.files) > 1 else str(name)
                self.all_synthetic &= series.synthetic
                self.has_dicom = True
                sources = [*(os.path.realpath(file) for file in series.files), series.uid]
                sources += [f"study {series.study}"] if series.study else []
        except _UnusableError as error:
            if self._strict:
                raise LayoutError(str(error)) from error
            self.notices.append(str(error))
            return None
        self._refuse_twice(row, str(images), center)
        patient_id = patient_of(row, name, from_dicom)
        if {self._owners.setdefault(source, patient_id) for source in sources} != {patient_id}:
            raise LayoutError(
                f"line {row.line} of {row.table} gives a volume, or another one of the same study, to another patient than "
                "an earlier line, and a patient under two ids is not protected. Correct the ids."
            )
        record: Record = {"image": images, "label": row.label, "patient_id": patient_id}
        return record | ({CENTER_KEY: list(center)} if center else {})

    def _find(self, row: LabelRow, path: Path | None) -> CTSeries:
        if self._series is None:
            tree = read_ct_series(self._folder, strict=self._strict)
            self._series = tree.series
            self.notices += tree.notices
        where = f"line {row.line} of {row.table}"
        if path is None:
            found = [series for series in self._series if series.uid == row.name.strip()]
            what = f"SeriesInstanceUID {row.name.strip()}"
        elif path.is_dir():
            place = path.resolve()
            found = [series for series in self._series if all(place in f.resolve().parents for f in series.files)]
            what = f"folder {path}"
        else:
            # A file stands for itself: an enhanced CT of many frames, or a single slice.
            found = [
                replace(series, files=(path,)) for series in self._series
                if path.resolve() in {file.resolve() for file in series.files}
            ]  # fmt: skip
            what = f"file {path}"
        if len(found) > 1:
            raise LayoutError(
                f"{where}: {what} holds {len(found)} CT series, and any may be meant. Name the series by a column "
                "series_uid, or give each a folder of its own."
            )
        if not found:
            raise _UnusableError(f"{where}: {what} holds no CT series that can be used, so the line was left out")
        return found[0]

    def _refuse_twice(self, row: LabelRow, image: str, center: tuple[float, ...]) -> None:
        first = self._seen.setdefault((image, center), row.line)
        if first != row.line:
            raise LayoutError(
                f"line {row.line} of {row.table} names a volume a second time, after line {first}, so it would count "
                "twice. Remove one line, or give the places of findings (coordX, coordY, coordZ)."
            )


class _UnusableError(Exception):
    """A volume that cannot be read, which does not end the reading of the others."""


def _center(row: LabelRow) -> tuple[float, ...]:
    cells = {name.strip().lower(): cell for name, cell in row.cells.items() if name}
    if not any(name in cells for name in _CENTER_COLUMNS):
        return ()
    try:
        center = tuple(float(cells[name]) for name in _CENTER_COLUMNS)
    except (KeyError, ValueError):
        center = (math.nan,)
    if not all(math.isfinite(value) for value in center):
        raise LayoutError(
            f"line {row.line} of {row.table} gives no place of three numbers in coordX, coordY, coordZ. Fill all three "
            "in, or remove these columns."
        )
    return center


def _is_synthetic_nifti(path: Path) -> bool:
    """Whether a NIfTI file, which must hold one volume, says that it is one of ours."""
    try:
        image: Any = nibabel.load(path)  # type: ignore[attr-defined]
        shape, said = image.shape, bytes(image.header["descrip"].tobytes()).rstrip(b"\0")
    except Exception as error:
        raise _UnusableError(f"NIfTI file {path} cannot be read ({one_line(error)}), and was left out") from error
    if len(shape) != 3:
        raise _UnusableError(f"NIfTI file {path} has shape {shape}, not that of one volume, and was left out")
    return bool(said == NIFTI_DESCRIPTION.encode())
