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

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from monai_privacy.data.image_files import RASTER_SUFFIXES, check_raster, image_format, one_line, read_dicom_header
from monai_privacy.data.source import UNNAMED_CLASSES, ImageSource, Record
from monai_privacy.data.synthetic import says_synthetic
from monai_privacy.data.tables import (
    LayoutError,
    checked_label,
    files_below,
    is_hidden,
    is_missing,
    named_path,
    only_table,
    patient_of,
    read_labels,
)

__all__ = ["read_chest_xrays"]

_PNEUMONIA = ("normal", "pneumonia")
_KERMANY_SPLITS = ("train", "val", "test")
_KERMANY_CLASSES = ("NORMAL", "PNEUMONIA")
# The names of the first release (person12_virus_35, NORMAL2-IM-0927-0001) and of the third (BACTERIA-1135262-0004).
# The disease is not part of the patient: one person has files of several diseases.
_KERMANY_PATIENTS = (
    re.compile(r"(?P<patient>person\d+)_(?:bacteria|virus)_\d+"),
    re.compile(r"(?P<patient>(?:NORMAL2-)?IM-\d+)-\d+"),
    re.compile(r"(?:NORMAL|BACTERIA|VIRUS)-(?P<patient>\d+)-\d+"),
)


def read_chest_xrays(source: str | os.PathLike[str]) -> ImageSource:
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


def _reader(path: Path) -> Callable[[Path], ImageSource]:
    if path.is_file() and path.suffix.lower() == ".npz":
        return _read_npz
    if path.is_dir() and _kermany_root(path) is not None:
        return _read_kermany
    if path.is_dir() and files_below(path, ".csv"):
        return _read_folder
    kind = "folder" if path.is_dir() else "file"
    raise ValueError(
        f"{kind} {path} has no layout that is known here: looked for {{train,val,test}}/{{NORMAL,PNEUMONIA}} folders "
        "(also in chest_xray/), one .csv of labels beside DICOM files, or a .npz file. Unpack archives, and name the "
        "folder or file that has one of these."
    )


# ------------------------------------------------------------------ Kermany 2018


def _kermany_root(path: Path) -> Path | None:
    for root in (path, path / "chest_xray"):
        # One place only: a common re-packed archive holds a second copy in chest_xray/chest_xray.
        if any((root / split / name).is_dir() for split in _KERMANY_SPLITS for name in _KERMANY_CLASSES):
            return root
    return None


def _read_kermany(path: Path) -> ImageSource:
    root = _kermany_root(path)
    assert root is not None
    records = []
    for split in _KERMANY_SPLITS:
        for label, name in enumerate(_KERMANY_CLASSES):
            for file in sorted((root / split / name).glob("*")):
                if file.suffix.lower() in RASTER_SUFFIXES and not is_hidden(Path(file.name)):
                    check_raster(file)
                    patient_id = _kermany_patient(file)
                    records.append({"image": str(file), "label": label, "patient_id": patient_id, "split": split})
    return ImageSource("kermany", tuple(records), has_patient_ids=True, class_names=_PNEUMONIA)


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


def _read_npz(path: Path) -> ImageSource:
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = set(archive.files)
            if {f"{split}_{part}" for split in _KERMANY_SPLITS for part in ("images", "labels")} <= keys:
                return _read_medmnist(path, archive)
            if {"images", "label", "patient_id"} <= keys:
                return _read_arrays(path, archive)
    except LayoutError:
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


def _read_medmnist(path: Path, archive: Mapping[str, np.ndarray]) -> ImageSource:
    records: list[Record] = []
    for split in _KERMANY_SPLITS:
        images = _checked_images(path, f"{split}_images", archive[f"{split}_images"])
        labels = _checked_labels(path, f"{split}_labels", archive[f"{split}_labels"], len(images))
        for image, label in zip(images, labels, strict=True):
            name = f"image-{len(records):06d}"
            records.append({"image": image, "label": label, "patient_id": name, "split": split})
    names = _PNEUMONIA if path.name.lower().startswith("pneumoniamnist") else UNNAMED_CLASSES
    return ImageSource("medmnist", tuple(records), has_patient_ids=False, class_names=names)


def _read_arrays(path: Path, archive: Mapping[str, np.ndarray]) -> ImageSource:
    images = _checked_images(path, "images", archive["images"])
    labels = _checked_labels(path, "label", archive["label"], len(images))
    patient_ids = [str(value).strip() for value in archive["patient_id"].tolist()]
    if len(patient_ids) != len(images):
        raise LayoutError(
            f"array patient_id of {path} has {len(patient_ids)} rows, images has {len(images)}, so some image has no "
            "patient. Give one id for each image."
        )
    for row, patient_id in enumerate(patient_ids):
        if is_missing(patient_id):
            raise LayoutError(
                f"patient_id[{row}] of {path} is empty, so the image cannot be protected with its patient. Give every "
                "image its patient's id."
            )
    records = [
        {"image": image, "label": label, "patient_id": patient_id}
        for image, label, patient_id in zip(images, labels, patient_ids, strict=True)
    ]
    return ImageSource("npz", tuple(records), has_patient_ids=True)


def _checked_images(path: Path, key: str, images: np.ndarray) -> np.ndarray:
    if images.ndim != 3 or images.dtype != np.uint8:
        raise LayoutError(
            f"array {key} of {path} is {images.dtype} of shape {images.shape}, not gray 8-bit pictures. Convert it to "
            "uint8 of shape (images, rows, columns)."
        )
    return images


def _checked_labels(path: Path, key: str, labels: np.ndarray, expected: int) -> list[int]:
    if labels.ndim == 2 and labels.shape[1] == 1:  # as MedMNIST stores them
        labels = labels[:, 0]
    if labels.shape != (expected,):
        raise LayoutError(
            f"array {key} of {path} has shape {labels.shape} for {expected} images, so it is not one label for each. "
            "Give one 0 or 1 for each image."
        )
    return [checked_label(value, f"{key}[{row}] of {path}") for row, value in enumerate(labels.tolist())]


# ------------------------------------------------------------------ DICOM and other files, with a CSV


def _read_folder(folder: Path) -> ImageSource:
    seen: dict[str, int] = {}
    records, marks = [], []
    for row in read_labels(only_table(folder)):
        file = named_path(row, seen)
        header = read_dicom_header(file) if image_format(file) == "dicom" else None
        patient_id = patient_of(row, file, None if header is None else str(header.get("PatientID") or "").strip())
        records.append({"image": str(file), "label": row.label, "patient_id": patient_id})
        marks.append(header is not None and says_synthetic(header))
    synthetic = bool(marks) and all(marks)
    class_names = _PNEUMONIA if synthetic else UNNAMED_CLASSES
    return ImageSource("folder", tuple(records), has_patient_ids=True, synthetic=synthetic, class_names=class_names)
