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
"""CT of lung nodules that are nobody's: drawn by a program, written as real DICOM series or NIfTI."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
from pydicom.dataset import FileDataset
from pydicom.uid import UID, CTImageStorage, generate_uid

from monai_privacy.data.synthetic import NIFTI_DESCRIPTION, SYNTHETIC_MARK, empty_file, new_folder
from monai_privacy.data.synthetic_nodules import Nodule, draw_attributes, draw_nodule

__all__ = ["SyntheticNodules", "write_synthetic_ct"]

_COMMENT = f"{SYNTHETIC_MARK} image drawn by monai_privacy; shows no person"
_README = f"""{SYNTHETIC_MARK} CT OF LUNG NODULES: NOT PATIENTS

These {{volumes}} volumes of {{patients}} invented "patients" were drawn by the program
monai_privacy.data.synthetic_ct (seed {{seed}}). They show no person, and names, ids and dates in them are
invented. Use them to try software out. Nothing learned or measured on them says anything about medicine, nor
about the privacy or accuracy to expect on real images.

labels.csv: file, label (0 looks benign, 1 looks malignant), patient_id, diameter_mm.
"""
_NODULES_A_PATIENT = (0.60, 0.22, 0.12, 0.06)  # chance of 1, 2, 3, 4 nodules
_SIDE_MM = 30.0
_TILTED, _WITH_SCOUT = 0.1, 0.3
# numpy takes [seed, number] and [seed, number, 0] for the same seed.
_STREAM_PATIENT, _STREAM_VOLUME, _STREAM_TRAINING = 11, 12, 13


def write_synthetic_ct(
    folder: str | os.PathLike[str],
    *,
    num_patients: int = 200,
    file_format: Literal["dicom", "nifti"] = "dicom",
    seed: int = 0,
) -> Path:
    """Write synthetic CT volumes of lung nodules, each a DICOM series of its own or a NIfTI file, with their labels.

    A patient has one to four nodules; half of the patients have nodules that look malignant. A volume is the 30 mm around
    a nodule, and as many slices as the nodule has; pixels and slices are as far apart as scanners make them (0.55 to
    0.85 mm, 0.6 to 2.5 mm). In DICOM, some series have a tilted gantry, and some patients a scout, which belongs to no
    volume. The same arguments write the same files, but for rounding on other machines.

    Args:
        folder: a new or empty folder. Gets the volumes in ``images/``, ``labels.csv`` (file, label, patient_id,
            diameter_mm) and ``README.txt``.
        num_patients: at least 2, so that both labels occur.
        file_format: "dicom" or "nifti".
        seed: not negative. Chooses patients and volumes; nothing here is private.

    Returns:
        The folder.

    Raises:
        ValueError: for too few patients, an unknown format, or a negative seed.
        FileExistsError: if the folder holds anything already.
    """
    if num_patients < 2:
        raise ValueError(f"num_patients is {num_patients}, too few for both labels to occur. Ask for at least 2.")
    if file_format not in ("dicom", "nifti"):
        raise ValueError(f"file_format is {file_format!r}, which is not known. Choose 'dicom' or 'nifti'.")
    if seed < 0:
        raise ValueError(f"seed is {seed}, which numpy's generators refuse. Choose 0 or more.")
    target = new_folder(folder)
    rows: list[tuple[str, int, str, str]] = []
    for number in range(num_patients):
        rng = np.random.default_rng([seed, _STREAM_PATIENT, number])
        patient_id = f"SYN{number:06d}"
        for index in range(1 + int(rng.choice(len(_NODULES_A_PATIENT), p=_NODULES_A_PATIENT))):
            nodule = draw_attributes(rng, label=number % 2 if rng.random() < 0.8 else None)
            own = np.random.default_rng([seed, _STREAM_VOLUME, number, index])
            name = f"images/{patient_id}_{index}" + (".nii.gz" if file_format == "nifti" else "")
            write = _write_nifti if file_format == "nifti" else _write_series
            write(target / name, nodule, patient_id, index, seed, own)
            rows.append((name, nodule.label, patient_id, f"{nodule.diameter_mm:.2f}"))
    with open(target / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "label", "patient_id", "diameter_mm"), *rows])
    text = _README.format(volumes=len(rows), patients=num_patients, seed=seed)
    (target / "README.txt").write_text(text, encoding="utf-8")
    return target


class SyntheticNodules:
    """Synthetic volumes for training beforehand, drawn when they are asked for: they are public, and cost no privacy.

    A sequence of records ``image`` (1, X, Y, Z) float32 HU of 1 mm voxels, and ``label``: (5,) float32, what the nodule
    looks like: the logarithm of its diameter over 8 mm, spiculation, solidity, calcified, at the wall.

    Args:
        length: number of records.
        spatial_size: voxels along each axis.
        seed: which records.
    """

    def __init__(self, length: int, spatial_size: int = 32, seed: int = 0) -> None:
        self.length, self.spatial_size, self.seed = length, spatial_size, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, _STREAM_TRAINING, index])
        nodule = draw_attributes(rng)
        side = self.spatial_size
        volume = draw_nodule(nodule, (side,) * 3, (1.0, 1.0, 1.0), rng)
        # As a volume that was cut to its nodule's slices looks once it lies in a box.
        depth = min(side, int(np.ceil(nodule.diameter_mm * rng.uniform(0.9, 1.3) + rng.uniform(0.0, 2.5))))
        start = (side - depth) // 2
        image = np.full((1, side, side, side), -1000.0, dtype=np.float32)
        image[0, :, :, start : start + depth] = volume[:, :, start : start + depth]
        label = [
            np.log(nodule.diameter_mm / 8.0),
            nodule.spiculation,
            nodule.solidity,
            float(nodule.calcified),
            float(nodule.at_wall),
        ]
        return {"image": image, "label": np.asarray(label, dtype=np.float32)}


def _draw(nodule: Nodule, rng: np.random.Generator) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A volume, and the spacing of its voxels."""
    pixel, slice_mm = rng.uniform(0.55, 0.85), float(rng.choice([0.625, 1.0, 1.25, 2.0, 2.5]))
    slices = max(2, int(np.ceil(1.1 * nodule.diameter_mm / slice_mm)))
    side = round(_SIDE_MM / pixel)
    spacing = (pixel, pixel, slice_mm)
    return draw_nodule(nodule, (side, side, slices), spacing, rng), spacing


def _write_nifti(path: Path, nodule: Nodule, patient_id: str, index: int, seed: int, rng: np.random.Generator) -> None:
    volume, spacing = _draw(nodule, rng)
    image = nibabel.Nifti1Image(np.rint(volume).astype(np.int16), np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))
    image.header["descrip"] = NIFTI_DESCRIPTION.encode()
    nibabel.save(image, path)


def _write_series(path: Path, nodule: Nodule, patient_id: str, index: int, seed: int, rng: np.random.Generator) -> None:
    volume, spacing = _draw(nodule, rng)
    tilt = np.deg2rad(rng.uniform(5.0, 20.0)) if rng.random() < _TILTED else 0.0
    corner = np.array([rng.uniform(-120.0, 90.0), rng.uniform(-100.0, 60.0), rng.uniform(-300.0, -50.0)])
    path.mkdir()
    # Files are named in no order: readers have to go by the position.
    names = rng.permutation(volume.shape[2])
    for number in range(volume.shape[2]):
        dataset = _ct_file(patient_id, index, number + 1, seed)
        # A tilted gantry leans each slice, and the table moves on along z all the same.
        dataset.ImageOrientationPatient = [
            1.0,
            0.0,
            0.0,
            0.0,
            round(float(np.cos(tilt)), 6),
            round(-float(np.sin(tilt)), 6),
        ]
        dataset.ImagePositionPatient = [round(float(v), 4) for v in corner + np.array([0.0, 0.0, number * spacing[2]])]
        dataset.GantryDetectorTilt = round(float(np.rad2deg(tilt)), 3)
        dataset.PixelSpacing = [round(spacing[1], 6), round(spacing[0], 6)]
        dataset.SliceThickness = spacing[2]
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        _store(dataset, volume[:, :, number].T)
        dataset.save_as(path / f"{names[number]:04d}.dcm", enforce_file_format=True)
    if index == 0 and rng.random() < _WITH_SCOUT:
        scout = _ct_file(patient_id, index, 0, seed, series="scout")
        scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        scout.ImageOrientationPatient, scout.ImagePositionPatient = [1.0, 0.0, 0.0, 0.0, 0.0, -1.0], list(corner)
        scout.PixelSpacing, scout.SliceThickness = [1.0, 1.0], 1.0
        _store(scout, np.full((64, 64), -200.0))
        scout.save_as(path / "scout.dcm", enforce_file_format=True)


def _ct_file(patient_id: str, index: int, number: int, seed: int, series: str = "series") -> FileDataset:
    def uid(*parts: str) -> UID:
        # Hashed from the seed, so that the same arguments write the same bytes.
        return generate_uid(entropy_srcs=["monai_privacy synthetic CT", str(seed), patient_id, *parts])

    dataset = empty_file(CTImageStorage)
    dataset.PatientID, dataset.PatientName = patient_id, f"{SYNTHETIC_MARK}^{patient_id}"
    dataset.PatientBirthDate = dataset.PatientSex = dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.StudyInstanceUID = uid("study")
    dataset.SeriesInstanceUID = uid(series, str(index))
    dataset.FrameOfReferenceUID = uid("frame")
    dataset.PositionReferenceIndicator = ""
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid(series, str(index), str(number))
    dataset.StudyID, dataset.SeriesNumber, dataset.InstanceNumber, dataset.AcquisitionNumber = "1", index + 1, number, 1
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = "20000101"
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = "120000"
    dataset.Modality = "CT"
    dataset.SeriesDescription = f"{SYNTHETIC_MARK} lung nodule"
    dataset.ImageComments = _COMMENT
    dataset.Manufacturer, dataset.ManufacturerModelName = "monai_privacy", "synthetic CT"
    dataset.BodyPartExamined, dataset.PatientPosition = "CHEST", "HFS"
    dataset.KVP = "120"
    return dataset


def _store(dataset: FileDataset, plane: np.ndarray) -> None:
    stored = np.clip(np.rint(plane) + 1024.0, 0, 4095).astype("<u2")
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "-1024", "1", "HU"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = "-600", "1500"
    dataset.PixelData = stored.tobytes()
