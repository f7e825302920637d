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

"""Read chest X-rays with a yes-or-no label, and their patients, from the four layouts in which people have them."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydicom.dataset import Dataset

from monai_privacy.data.image_files import RASTER_SUFFIXES, check_raster, image_format, one_line, read_dicom_header
from monai_privacy.data.synthetic import SYNTHETIC_MARK

__all__ = [
    "ChestXRaySource",
    "count_patients",
    "read_chest_xrays",
]

Layout = Literal["kermany", "medmnist", "npz", "folder"]
Record = dict[str, Any]

_PNEUMONIA = ("normal", "pneumonia")
_UNNAMED = ("negative", "positive")
_FILE_COLUMNS = ("file", "filename", "image", "path")
_LABEL_COLUMNS = ("label", "target")
_PATIENT_COLUMNS = ("patient_id", "patientid")
_KERMANY_SPLITS = ("train", "val", "test")
_KERMANY_CLASSES = ("NORMAL", "PNEUMONIA")
# The names of the first release (person12_virus_35, NORMAL2-IM-0927-0001) and of the third (BACTERIA-1135262-0004).
# The disease is not part of the patient: one person has files of several diseases.
_KERMANY_PATIENTS = (
    re.compile(r"(?P<patient>person\d+)_(?:bacteria|virus)_\d+"),
    re.compile(r"(?P<patient>(?:NORMAL2-)?IM-\d+)-\d+"),
    re.compile(r"(?:NORMAL|BACTERIA|VIRUS)-(?P<patient>\d+)-\d+"),
)


@dataclass(frozen=True, eq=False)
class ChestXRaySource:
    """What was found.

    Args:
        layout: which of the four layouts it is.
        records: one dictionary for each image: ``image`` (path as text, or (H, W) uint8 array), ``label`` (0 or 1),
            ``patient_id``, and ``split`` where the source has splits of its own.
        has_patient_ids: whether ``patient_id`` names patients. If not, each image counts as a patient of its own, and
            a guarantee for a "patient" covers only one image.
        synthetic: whether every image says that it is synthetic.
        class_names: the names of labels 0 and 1.
    """

    layout: Layout
    records: tuple[Record, ...]
    has_patient_ids: bool
    synthetic: bool = False
    class_names: tuple[str, str] = _UNNAMED

    @property
    def unit(self) -> Literal["patient", "image"]:
        """Whom the source allows to protect."""
        return "patient" if self.has_patient_ids else "image"


def count_patients(records: Iterable[Mapping[str, Any]]) -> int:
    """The number of different patients in the records."""
    return len({record["patient_id"] for record in records})


def read_chest_xrays(source: str | os.PathLike[str]) -> ChestXRaySource:
    """Recognise the layout of ``source`` and read its records; pixels of files stay unread.

    - a folder ``chest_xray`` (or its parent) as Kermany et al. 2018 is downloaded:
      ``{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg``, the patient in the file name;
    - a MedMNIST ``.npz`` with two classes: ``train_images``, ``train_labels``, ``val_...``, ``test_...``, no patients;
    - an ``.npz`` with ``images`` (N, H, W) uint8, ``label`` (N,), ``patient_id`` (N,);
    - a folder of DICOM files, at any depth, with exactly one CSV: a column ``file`` (or ``filename``, ``image``,
      ``path``; relative to the CSV), a column ``label`` (or ``target``), and ``patient_id`` or else DICOM's PatientID.
      PNG, JPEG and NIfTI files may be named too if the CSV has patient ids. Files that the CSV does not name are left.

    Args:
        source: the folder or file.

    Raises:
        FileNotFoundError: if ``source`` does not exist.
        ValueError: for anything in it that cannot be used; the message names the file, the reason and the remedy.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"source {path} does not exist. Check the path, and download or mount the data first.")
    found = _reader(path)(path)
    if not found.records:
        raise ValueError(
            f"source {path} ({found.layout} layout) holds no images, so there is nothing to learn from. Check the path."
        )
    labels = {record["label"] for record in found.records}
    if len(labels) == 1:
        raise ValueError(
            f"all {len(found.records)} images of {path} have label {labels.pop()}, and nothing tells one class from "
            "none. Give images of both classes, 0 and 1."
        )
    return found


def _reader(path: Path) -> Callable[[Path], ChestXRaySource]:
    if path.is_file() and path.suffix.lower() == ".npz":
        return _read_npz
    if path.is_dir() and _kermany_root(path) is not None:
        return _read_kermany
    if path.is_dir() and _files(path, ".csv"):
        return _read_folder
    kind = "folder" if path.is_dir() else "file"
    raise ValueError(
        f"{kind} {path} has no layout that is known here: looked for {{train,val,test}}/{{NORMAL,PNEUMONIA}} folders "
        "(also in chest_xray/), one .csv of labels beside DICOM files, or a .npz file. Unpack archives, and name the "
        "folder or file that has one of these."
    )


def _files(folder: Path, suffix: str) -> list[Path]:
    """Files below a folder, sorted, without those that macOS and file managers hide in archives."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() == suffix and p.is_file())
    return sorted(p for p in found if not _hidden(p.relative_to(folder)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


# ------------------------------------------------------------------ Kermany 2018


def _kermany_root(path: Path) -> Path | None:
    for root in (path, path / "chest_xray"):
        # One place only: a common re-packed archive holds a second copy in chest_xray/chest_xray.
        if any((root / split / name).is_dir() for split in _KERMANY_SPLITS for name in _KERMANY_CLASSES):
            return root
    return None


def _read_kermany(path: Path) -> ChestXRaySource:
    root = _kermany_root(path)
    assert root is not None
    records = []
    for split in _KERMANY_SPLITS:
        for label, name in enumerate(_KERMANY_CLASSES):
            for file in sorted((root / split / name).glob("*")):
                if file.suffix.lower() in RASTER_SUFFIXES and not _hidden(Path(file.name)):
                    check_raster(file)
                    patient_id = _kermany_patient(file)
                    records.append({"image": str(file), "label": label, "patient_id": patient_id, "split": split})
    return ChestXRaySource("kermany", tuple(records), has_patient_ids=True, class_names=_PNEUMONIA)


def _kermany_patient(file: Path) -> str:
    for pattern in _KERMANY_PATIENTS:
        match = pattern.match(file.name)
        if match:
            return match["patient"]
    raise ValueError(
        f"file name {file} tells no patient as person12_bacteria_47, IM-0115-0001 or VIRUS-614452-0001 do, and without "
        "one the image cannot be protected with its patient. Restore the name, or use a folder with a CSV instead."
    )


# ------------------------------------------------------------------ arrays


def _read_npz(path: Path) -> ChestXRaySource:
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = set(archive.files)
            if {f"{split}_{part}" for split in _KERMANY_SPLITS for part in ("images", "labels")} <= keys:
                return _read_medmnist(path, archive)
            if {"images", "label", "patient_id"} <= keys:
                return _read_arrays(path, archive)
    except _LayoutError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds for a broken or pickled archive
        raise ValueError(
            f"file {path} cannot be read as .npz ({one_line(error)}). Download or write it again; store text as numpy "
            "text arrays, not as objects."
        ) from error
    raise ValueError(
        f"file {path} has the arrays {sorted(keys)}, no layout that is known here: looked for train_images, "
        "train_labels, val_..., test_... (MedMNIST), or images, label, patient_id. Rename its arrays."
    )


class _LayoutError(ValueError):
    """Marks our own messages, so that they are not taken for a failure to read."""


def _read_medmnist(path: Path, archive: Mapping[str, np.ndarray]) -> ChestXRaySource:
    records: list[Record] = []
    for split in _KERMANY_SPLITS:
        images = _checked_images(path, f"{split}_images", archive[f"{split}_images"])
        labels = _checked_labels(path, f"{split}_labels", archive[f"{split}_labels"], len(images))
        for image, label in zip(images, labels, strict=True):
            name = f"image-{len(records):06d}"
            records.append({"image": image, "label": label, "patient_id": name, "split": split})
    names = _PNEUMONIA if path.name.lower().startswith("pneumoniamnist") else _UNNAMED
    return ChestXRaySource("medmnist", tuple(records), has_patient_ids=False, class_names=names)


def _read_arrays(path: Path, archive: Mapping[str, np.ndarray]) -> ChestXRaySource:
    images = _checked_images(path, "images", archive["images"])
    labels = _checked_labels(path, "label", archive["label"], len(images))
    patient_ids = [str(value).strip() for value in archive["patient_id"].tolist()]
    if len(patient_ids) != len(images):
        raise _LayoutError(
            f"array patient_id of {path} has {len(patient_ids)} rows, images has {len(images)}, so some image has no "
            "patient. Give one id for each image."
        )
    for row, patient_id in enumerate(patient_ids):
        if _is_missing(patient_id):
            raise _LayoutError(
                f"patient_id[{row}] of {path} is empty, so the image cannot be protected with its patient. Give every "
                "image its patient's id."
            )
    records = [
        {"image": image, "label": label, "patient_id": patient_id}
        for image, label, patient_id in zip(images, labels, patient_ids, strict=True)
    ]
    return ChestXRaySource("npz", tuple(records), has_patient_ids=True)


def _checked_images(path: Path, key: str, images: np.ndarray) -> np.ndarray:
    if images.ndim != 3 or images.dtype != np.uint8:
        raise _LayoutError(
            f"array {key} of {path} is {images.dtype} of shape {images.shape}, not gray 8-bit pictures. Convert it to "
            "uint8 of shape (images, rows, columns)."
        )
    return images


def _checked_labels(path: Path, key: str, labels: np.ndarray, expected: int) -> list[int]:
    if labels.ndim == 2 and labels.shape[1] == 1:  # as MedMNIST stores them
        labels = labels[:, 0]
    if labels.shape != (expected,):
        raise _LayoutError(
            f"array {key} of {path} has shape {labels.shape} for {expected} images, so it is not one label for each. "
            "Give one 0 or 1 for each image."
        )
    return [_label(value, f"{key}[{row}] of {path}") for row, value in enumerate(labels.tolist())]


def _is_missing(patient_id: str) -> bool:
    return patient_id.strip().lower() in ("", "nan", "none")  # the last two are what pandas writes for no value


def _label(value: object, where: str) -> int:
    try:
        number = float(value)  # type: ignore[arg-type]  # spreadsheets write 1 as "1.0"
    except (TypeError, ValueError):
        number = -1.0
    if number not in (0.0, 1.0):
        raise _LayoutError(
            f"label {value!r} at {where} is neither 0 nor 1, and only two classes are supported. Recode the labels."
        )
    return int(number)


# ------------------------------------------------------------------ DICOM and other files, with a CSV


def _read_folder(folder: Path) -> ChestXRaySource:
    tables = _files(folder, ".csv")
    if len(tables) > 1:
        names = ", ".join(str(table.relative_to(folder)) for table in tables)
        raise ValueError(
            f"folder {folder} has {len(tables)} CSV files ({names}), and any may hold the labels. Leave one of them."
        )
    table = tables[0]
    columns, rows = _read_table(table)
    seen: dict[str, int] = {}
    records, marks = [], []
    for line, row in rows:
        file = _named_file(table, line, row[columns["file"]], seen)
        header = read_dicom_header(file) if image_format(file) == "dicom" else None
        cell = row[columns["patient"]] if "patient" in columns else None
        patient_id = _patient_of(table, line, file, header, cell)
        label = _label(row[columns["label"]], f"line {line} of {table}")
        records.append({"image": str(file), "label": label, "patient_id": patient_id})
        marks.append(header is not None and _says_synthetic(header))
    synthetic = bool(marks) and all(marks)
    class_names = _PNEUMONIA if synthetic else _UNNAMED
    return ChestXRaySource("folder", tuple(records), has_patient_ids=True, synthetic=synthetic, class_names=class_names)


def _read_table(table: Path) -> tuple[dict[str, str], list[tuple[int, dict[str, str]]]]:
    """Which column is which, and the rows with their line numbers."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin UTF-8 with a mark
            head = file.readline()
            file.seek(0)
            # Spreadsheets of half of Europe separate columns by semicolons.
            reader = csv.DictReader(file, delimiter=";" if ";" in head and "," not in head else ",", restval="")
            rows = [(reader.line_num, row) for row in reader]
            names = list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise _LayoutError(f"CSV {table} cannot be read ({one_line(error)}). Save it as a UTF-8 CSV file.") from error
    columns = {}
    wanted = {"file": _FILE_COLUMNS, "label": _LABEL_COLUMNS, "patient": _PATIENT_COLUMNS}
    for meaning, choices in wanted.items():
        matches = [name for name in names if name.strip().lower() in choices]
        if len(matches) > 1:
            raise _LayoutError(f"CSV {table} has the columns {matches}, and either may be the {meaning}. Leave one.")
        if matches:
            columns[meaning] = matches[0]
        elif meaning != "patient":
            raise _LayoutError(
                f"CSV {table} has the columns {names}, none of which is {' or '.join(choices)}. Rename the column that "
                f"holds the {meaning}."
            )
    return columns, rows


def _named_file(table: Path, line: int, name: str, seen: dict[str, int]) -> Path:
    file = table.parent / name.strip()
    if not name.strip() or not file.is_file():
        raise _LayoutError(
            f"line {line} of {table} names the file {name!r}, which does not exist in {table.parent}. Give paths "
            "relative to the CSV, or remove the line."
        )
    first = seen.setdefault(os.path.realpath(file), line)
    if first != line:
        raise _LayoutError(
            f"line {line} of {table} names the file {name!r} a second time, after line {first}, so the image would "
            "count twice. Remove one line."
        )
    return file


def _patient_of(table: Path, line: int, file: Path, header: Dataset | None, cell: str | None) -> str:
    # No message shows an id: it may name a person, and messages end up in logs.
    from_dicom = "" if header is None else str(header.get("PatientID") or "").strip()
    if cell is not None:
        from_table = cell.strip()
        if _is_missing(from_table):
            raise _LayoutError(
                f"patient id of {file} on line {line} of {table} is empty, so the image cannot be protected with its "
                "patient. Fill it in, or remove the line."
            )
        if from_dicom and from_dicom != from_table:
            raise _LayoutError(
                f"patient id of {file} on line {line} of {table} is not the one in its DICOM header, and a patient "
                "under two ids is not protected. Correct the line, or de-identify the file with the same id."
            )
        return from_table
    if header is None:
        raise _LayoutError(
            f"CSV {table} has no column patient_id, and {file} is no DICOM file that could tell the patient. Add the "
            "column."
        )
    if not from_dicom:
        raise _LayoutError(
            f"PatientID of {file} is empty and CSV {table} has no column patient_id, so the image cannot be protected "
            "with its patient. Add the column."
        )
    return from_dicom


def _says_synthetic(header: Dataset) -> bool:
    # Two fields: "synthetic" alone begins the description of some real series, as "SYNTHETIC MR".
    fields = (str(header.get(name, "")) for name in ("SeriesDescription", "ImageComments"))
    return all(field.startswith(SYNTHETIC_MARK) for field in fields)
