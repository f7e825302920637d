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

from __future__ import annotations

import csv
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation

from monai_privacy.data.synthetic import write_synthetic_chest_xrays

NUM_PATIENTS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("synthetic") / "made" / "here"
    assert write_synthetic_chest_xrays(target, num_patients=NUM_PATIENTS, image_size=32, seed=5) == target
    return target


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def files(folder: Path, rows: list[dict[str, str]]) -> list[pydicom.FileDataset]:
    return [pydicom.dcmread(folder / row["file"]) for row in rows]


@pytest.fixture(scope="module")
def pictures(files: list[pydicom.FileDataset]) -> np.ndarray:
    """Bone bright, whatever the file stores."""
    return np.stack([4095 - f.pixel_array if is_inverted(f) else f.pixel_array for f in files]).astype(np.float64)


def is_inverted(file: pydicom.FileDataset) -> bool:
    return file.PhotometricInterpretation == "MONOCHROME1"


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    wins = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    return float((wins > 0).mean())


def test_table_and_files_agree(folder: Path, rows: list[dict[str, str]], files: list[pydicom.FileDataset]) -> None:
    assert list(rows[0]) == ["file", "label", "patient_id"]
    assert {folder / row["file"] for row in rows} == set((folder / "images").iterdir())
    assert [row["patient_id"] for row in rows] == [file.PatientID for file in files]
    label_of = {row["patient_id"]: row["label"] for row in rows}
    assert len(label_of) == NUM_PATIENTS
    assert all(label_of[row["patient_id"]] == row["label"] for row in rows)
    assert sorted(label_of.values()) == ["0"] * 60 + ["1"] * 60
    counts = np.unique([row["patient_id"] for row in rows], return_counts=True)[1]
    assert set(counts) == {1, 2, 3, 4, 5}
    assert (counts == 1).mean() > 0.4


def test_nobody_can_take_them_for_patients(folder: Path, files: list[pydicom.FileDataset]) -> None:
    assert "NOT PATIENTS" in (folder / "README.txt").read_text(encoding="utf-8")
    for file in files:
        assert file.SeriesDescription.startswith("SYNTHETIC")
        assert file.ImageComments.startswith("SYNTHETIC")
        assert str(file.PatientName).startswith("SYNTHETIC")


def test_files_are_the_dicom_objects_that_they_say(files: list[pydicom.FileDataset]) -> None:
    kinds = {"DX": DigitalXRayImageStorageForPresentation, "CR": ComputedRadiographyImageStorage}
    views = {"DX": "PA", "CR": "AP"}
    assert {file.Modality for file in files} == set(kinds)
    for file in files:
        assert file.SOPClassUID == file.file_meta.MediaStorageSOPClassUID == kinds[file.Modality]
        assert file.SOPInstanceUID == file.file_meta.MediaStorageSOPInstanceUID
        assert file.ViewPosition == views[file.Modality]
        assert (file.Rows, file.Columns, file.BitsStored, file.HighBit) == (32, 32, 12, 11)
        assert file.PatientSex in {"F", "M"}
        assert re.fullmatch(r"\d{3}Y", file.PatientAge)
        assert file.pixel_array.max() <= 4095
        if file.Modality == "DX":
            # A DX object must say the same three times.
            signs = (file.PresentationLUTShape, file.PixelIntensityRelationshipSign)
            assert signs == (("INVERSE", 1) if is_inverted(file) else ("IDENTITY", -1))
    for attribute in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        assert len({file[attribute].value for file in files}) == len(files)


def test_about_a_tenth_is_monochrome1_and_really_inverted(
    files: list[pydicom.FileDataset], pictures: np.ndarray
) -> None:
    inverted = np.array([is_inverted(file) for file in files])
    assert 0.04 < inverted.mean() < 0.18
    typical = pictures[~inverted].mean(axis=0)
    likeness = [np.corrcoef(typical.ravel(), file.pixel_array.ravel())[0, 1] for file in files]
    assert max(np.array(likeness)[inverted]) < -0.3
    assert min(np.array(likeness)[~inverted]) > 0.3


def test_the_label_shows_in_the_lungs_but_not_in_the_brightness(
    rows: list[dict[str, str]], files: list[pydicom.FileDataset], pictures: np.ndarray
) -> None:
    labels = np.array([int(row["label"]) for row in rows])
    assert 0.25 < auc(pictures.mean(axis=(1, 2)), labels) < 0.75
    lungs = pictures[:, 8:24, 6:26].mean(axis=(1, 2)) / pictures.mean(axis=(1, 2))
    assert auc(lungs, labels) > 0.65
    # Nothing beside the picture gives it away.
    for told in (is_inverted, lambda file: file.Modality == "CR", lambda file: file.PatientSex == "F"):
        assert abs(auc(np.array([told(f) for f in files]) + 1e-9 * np.arange(len(files)), labels) - 0.5) < 0.15


def test_images_of_one_patient_share_the_anatomy(rows: list[dict[str, str]], pictures: np.ndarray) -> None:
    healthy = [index for index, row in enumerate(rows) if row["label"] == "0"]
    alike = np.corrcoef(pictures[healthy].reshape(len(healthy), -1))
    pairs = [(rows[healthy[a]]["patient_id"] == rows[healthy[b]]["patient_id"], alike[a, b])
             for a, b in combinations(range(len(healthy)), 2)]  # fmt: skip
    same = np.mean([value for is_same, value in pairs if is_same])
    other = np.mean([value for is_same, value in pairs if not is_same])
    assert same > other + 0.02
    assert same < 0.999  # no two images are copies


def test_first_image_does_not_repeat_the_patients_draws(files: list[pydicom.FileDataset]) -> None:
    # numpy seeds [7] and [7, 0] alike; with one stream for both, sex would decide the view of every first image.
    first = {file.PatientID: file for file in reversed(files)}.values()
    assert {(file.PatientSex, file.ViewPosition) for file in first} == {(s, v) for s in "FM" for v in ("PA", "AP")}


def test_the_seed_decides_and_more_patients_change_nothing(tmp_path: Path) -> None:
    def written(name: str, num_patients: int, seed: int) -> list[bytes]:
        target = write_synthetic_chest_xrays(tmp_path / name, num_patients=num_patients, image_size=32, seed=seed)
        return [path.read_bytes() for path in sorted((target / "images").iterdir())]

    few = written("few", 4, 0)
    assert few == written("again", 4, 0)
    assert few == written("more", 6, 0)[: len(few)]
    assert few[0] != written("other", 4, 1)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_patients": 1}, "num_patients is 1, too few"),
        ({"image_size": 31}, "image_size is 31"),
        ({"image_size": 1025}, "image_size is 1025"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_errors(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        write_synthetic_chest_xrays(tmp_path / "new", **arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("real")
    with pytest.raises(FileExistsError, match=r"not empty.*Name a new or empty folder"):
        write_synthetic_chest_xrays(tmp_path, num_patients=2)
    assert (tmp_path / "labels.csv").read_text() == "real"
