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

"""The datalist of a bundle: split by patient, pseudonyms in place of patient ids."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import load_decathlon_datalist
from PIL import Image

from monai_privacy.data.source import ImageSource, Record, count_patients
from monai_privacy.data.splits import split_patients

_DATALIST_SPLIT = {"train": "training", "val": "validation", "test": "test"}


def write_datalist(
    source: ImageSource,
    folder: str | os.PathLike[str],
    *,
    seed: int,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
) -> Path:
    """Split by patient and write ``datalist.json``, which ``monai.data.load_decathlon_datalist`` reads.

    No patient id gets into the list: it holds pseudonyms that cannot be traced back, not even by whoever knows the
    ids, because the key they are made with is thrown away. File names and labels stay as they are, so the list is
    still as private as the images. Pictures that lie in arrays are written as 8-bit PNG to ``images/``.

    Args:
        source: what ``read_chest_xrays`` or ``read_ct_volumes`` returned.
        folder: made if need be; ``datalist.json`` in it is replaced. Files below it are listed by relative paths, all
            others by absolute ones.
        seed: for ``split_patients``. MedMNIST keeps its official splits instead, whatever seed and fractions are.
        test_fraction: expected fraction of the patients in ``test``.
        validation_fraction: expected fraction of the patients in ``validation``.

    Returns:
        The path of ``datalist.json``: ``training``, ``validation`` and ``test`` are lists of ``image`` (a list of files
        for a DICOM series), ``label`` (int) and, where the source names patients, ``patient_id``; a split of fraction 0
        has no list. ``unit`` tells what may be protected, ``num_patients`` how many of those units there are in each
        split.

    Raises:
        ValueError: for fractions that leave no training set, and if a split lacks one of the classes.
    """
    splits = _split(source, seed, test_fraction, validation_fraction)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    # Never stored: with it, anybody could find a patient by trying ids. Without patients there is no id to write: an
    # image's own number under that name would pass a guarantee for images off as one for patients.
    key = secrets.token_bytes(32) if source.has_patient_ids else None
    datalist: dict[str, Any] = {
        "name": f"{source.kind} ({source.layout})",
        "description": f"{' or '.join(source.class_names)}, split by {source.unit}; ids are pseudonyms",
        "synthetic": source.synthetic,
        "unit": source.unit,
        "labels": {str(label): name for label, name in enumerate(source.class_names)},
        "num_patients": {
            name: count_patients([source.records[index] for index in indices]) for name, indices in splits.items()
        },
    }
    for name, indices in splits.items():
        if indices:
            datalist[name] = [_entry(source.records[index], index, target, key) for index in indices]
    path = target / "datalist.json"
    # Whole or not at all: half a list would be a smaller cohort without anybody noticing.
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(datalist, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def bundle_records(
    datalist_file: str | os.PathLike[str], split: str, *, base_dir: str | os.PathLike[str]
) -> list[Record]:
    """The records of one split of a ``datalist.json``, for a bundle's config file.

    Args:
        datalist_file: what ``write_datalist`` wrote.
        split: "training", "validation" or "test".
        base_dir: where relative paths in the list start.

    Raises:
        SystemExit: where there is no such file or split, with one line that says how to make it.
    """
    path = Path(datalist_file)
    if not path.is_file():
        raise _stop(
            f"{path} does not exist: the images are not prepared. "
            f"Run: python -m monai_privacy prepare <your images> {path.parent} (with --ct for CT volumes)"
        )
    if not json.loads(path.read_text(encoding="utf-8")).get(split):
        raise _stop(f"{path} has no {split} images. Prepare them with a share of the patients for {split}.")
    records: list[Record] = load_decathlon_datalist(path, data_list_key=split, base_dir=base_dir)
    return records


def _stop(message: str) -> SystemExit:
    # MONAI's config parser wraps any ordinary exception, and ends sixty lines of traceback with words of its own.
    return SystemExit(f"error: {message}")


def _split(source: ImageSource, seed: int, test: float, validation: float) -> dict[str, Sequence[int]]:
    splits: dict[str, Sequence[int]]
    if source.layout == "medmnist":
        # Not Kermany's folders: their train and test hold the same patients (person1_bacteria_1 and person1_virus_6).
        splits = {
            ours: [index for index, record in enumerate(source.records) if record["split"] == theirs]
            for theirs, ours in _DATALIST_SPLIT.items()
        }
        wanted = set(splits)
    else:
        fractions = _fractions(test, validation)
        splits = dict(split_patients([record["patient_id"] for record in source.records], fractions, seed=seed))
        wanted = {name for name, fraction in fractions.items() if fraction > 0.0}
    for name in splits:
        labels = {source.records[index]["label"] for index in splits[name]}
        if name in wanted and len(labels) < 2:
            raise ValueError(
                f"split {name} has {len(splits[name])} images of {len(labels)} classes, too few to learn from or to "
                f"measure. Add patients to the {count_patients(source.records)} there are, raise its fraction, or "
                "change the seed."
            )
    return splits


def _fractions(test: float, validation: float) -> dict[str, float]:
    if not (test >= 0.0 and validation >= 0.0 and test + validation < 1.0):
        raise ValueError(
            f"test_fraction {test} and validation_fraction {validation} leave nobody to train on, or are negative. "
            "Give two numbers from 0 whose sum is below 1."
        )
    return {"training": 1.0 - test - validation, "validation": validation, "test": test}


def _entry(record: Record, index: int, folder: Path, key: bytes | None) -> Record:
    image = record["image"]
    listed: str | list[str]
    if isinstance(image, np.ndarray):
        listed = f"images/{index:06d}.png"
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / listed, compress_level=1)  # thousands of them: speed before size
    elif isinstance(image, str):
        listed = _listed_path(Path(image), folder)
    else:
        listed = [_listed_path(Path(one), folder) for one in image]
    entry: Record = {name: value for name, value in record.items() if name not in ("split", "patient_id")}
    entry["image"] = listed
    if key is not None:
        entry["patient_id"] = hmac.new(key, record["patient_id"].encode(), hashlib.sha256).hexdigest()[:16]
    return entry


def _listed_path(image: Path, folder: Path) -> str:
    image, folder = Path(os.path.abspath(image)), Path(os.path.abspath(folder))
    return image.relative_to(folder).as_posix() if image.is_relative_to(folder) else str(image)
