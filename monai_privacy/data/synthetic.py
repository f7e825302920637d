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

"""Chest X-rays that are nobody's: drawn by a program, written as real DICOM files, for tests and first runs."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)

from monai_privacy.data.synthetic_drawing import STREAM_IMAGE, Patient, draw_patients, draw_picture

__all__ = ["NIFTI_DESCRIPTION", "SYNTHETIC_MARK", "new_folder", "says_synthetic", "write_synthetic_chest_xrays"]

#: SeriesDescription and ImageComments of every file begin with this word.
SYNTHETIC_MARK = "SYNTHETIC"
#: The field "descrip" of every NIfTI file.
NIFTI_DESCRIPTION = f"{SYNTHETIC_MARK} nodule, shows no person"

_COMMENT = f"{SYNTHETIC_MARK} image drawn by monai_privacy; shows no person"
_README = f"""{SYNTHETIC_MARK} CHEST X-RAYS: NOT PATIENTS

These {{images}} images of {{patients}} invented "patients" were drawn by the program
monai_privacy.data.synthetic (seed {{seed}}, {{size}} x {{size}} pixels). They show no person, and names, ids,
ages and dates in them are invented. Use them to try software out. Nothing learned or measured on them says
anything about medicine, nor about the privacy or accuracy to expect on real images.

labels.csv: file, label (0 normal, 1 pneumonia), patient_id.
"""

_MAX_STORED = 4095  # 12 bits
_MONOCHROME1_FRACTION = 0.1
_DETECTOR_WIDTH_MM = 256.0


def write_synthetic_chest_xrays(
    folder: str | os.PathLike[str], *, num_patients: int = 600, image_size: int = 64, seed: int = 0
) -> Path:
    """Write synthetic chest X-rays as DICOM files, with their labels.

    Half of the patients have pneumonia (one or more opacities in a lung). A patient has one to five images, in which
    the anatomy is the same and position, breathing, exposure and noise differ. Frontal images taken standing (PA) are
    Digital X-Ray objects, those taken lying (AP) Computed Radiography; pixels are 12-bit, and about a tenth of the
    files is MONOCHROME1, as in hospitals. The same arguments
    write the same files, but for rounding on other machines.

    Args:
        folder: a new or empty folder. Gets ``images/*.dcm``, ``labels.csv`` (file, label, patient_id), ``README.txt``.
        num_patients: at least 2, so that both labels occur. There are about 1.7 images a patient.
        image_size: rows and columns, from 32 to 1024.
        seed: not negative. Chooses patients and pictures; nothing here is private.

    Returns:
        The folder.

    Raises:
        ValueError: for too few patients, a size out of range, or a negative seed.
        FileExistsError: if the folder holds anything already.
    """
    if num_patients < 2:
        raise ValueError(f"num_patients is {num_patients}, too few for both labels to occur. Ask for at least 2.")
    if not 32 <= image_size <= 1024:
        raise ValueError(f"image_size is {image_size}, at which no chest can be drawn. Choose from 32 to 1024.")
    if seed < 0:
        raise ValueError(f"seed is {seed}, which numpy's generators refuse. Choose 0 or more.")
    target = new_folder(folder)

    rows: list[tuple[str, int, str]] = []
    for patient in draw_patients(num_patients, seed):
        for image in range(patient.images):
            # A generator for each image: asking for more patients or other sizes leaves the first ones alike.
            rng = np.random.default_rng([seed, STREAM_IMAGE, patient.number, image])
            name = f"images/{len(rows):06d}.dcm"
            dataset = _dicom(patient, image, image_size, seed, rng)
            dataset.save_as(target / name, enforce_file_format=True)
            rows.append((name, patient.label, dataset.PatientID))
    with open(target / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "label", "patient_id"), *rows])
    text = _README.format(images=len(rows), patients=num_patients, seed=seed, size=image_size)
    (target / "README.txt").write_text(text, encoding="utf-8")
    return target


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder for invented images, with ``images/`` in it, made where it is missing.

    Raises:
        FileExistsError: if it holds anything already.
    """
    target = Path(folder)
    if target.is_dir() and any(target.iterdir()):
        # Never mix invented images with what may be real ones.
        raise FileExistsError(f"folder {target} is not empty, and its files could be real. Name a new or empty folder.")
    (target / "images").mkdir(parents=True, exist_ok=True)
    return target


def says_synthetic(header: Dataset) -> bool:
    """Whether a DICOM header says that its image is one of ours."""
    # Two fields: "synthetic" alone begins the description of some real series, as "SYNTHETIC MR".
    fields = (str(header.get(name, "")) for name in ("SeriesDescription", "ImageComments"))
    return all(field.startswith(SYNTHETIC_MARK) for field in fields)


def _dicom(patient: Patient, image: int, size: int, seed: int, rng: np.random.Generator) -> FileDataset:
    """One image as a Digital X-Ray (PA) or Computed Radiography (AP) object."""
    view = "AP" if rng.random() < 0.35 else "PA"
    inverted = rng.random() < _MONOCHROME1_FRACTION
    picture = draw_picture(patient, view, size, rng)
    dataset = empty_file(DigitalXRayImageStorageForPresentation if view == "PA" else ComputedRadiographyImageStorage)
    _describe_patient(dataset, patient, image, seed)
    _describe_image(dataset, view)
    if view == "PA":
        _describe_digital_xray(dataset, size, inverted)
    _store_pixels(dataset, picture, inverted)
    return dataset


def empty_file(sop_class: UID) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = sop_class
    return dataset


def _describe_patient(dataset: FileDataset, patient: Patient, image: int, seed: int) -> None:
    patient_id = f"SYN{patient.number:06d}"

    def uid(*parts: str) -> UID:
        # Hashed from the seed, so that the same arguments write the same bytes.
        return generate_uid(entropy_srcs=["monai_privacy synthetic", str(seed), patient_id, *parts])

    dataset.PatientID = patient_id
    dataset.PatientName = f"{SYNTHETIC_MARK}^{patient_id}"
    dataset.PatientBirthDate = ""
    dataset.PatientSex = patient.sex
    dataset.PatientAge = f"{patient.age_years:03d}Y"
    dataset.StudyInstanceUID = uid("study", str(image))
    dataset.SeriesInstanceUID = uid("series", str(image))
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid("image", str(image))
    dataset.StudyID = str(image + 1)
    dataset.SeriesNumber = dataset.InstanceNumber = 1
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = f"2000010{image + 1}"
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = "120000"
    dataset.AccessionNumber = dataset.ReferringPhysicianName = ""


def _describe_image(dataset: FileDataset, view: str) -> None:
    dataset.Modality = "DX" if view == "PA" else "CR"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", ""] if view == "PA" else ["ORIGINAL", "PRIMARY"]
    dataset.SeriesDescription = f"{SYNTHETIC_MARK} chest {view}"
    dataset.ImageComments = _COMMENT
    dataset.Manufacturer = "monai_privacy"
    dataset.ManufacturerModelName = "synthetic chest X-ray"
    dataset.DeviceSerialNumber, dataset.SoftwareVersions = "0", "1"
    dataset.BodyPartExamined = "CHEST"
    dataset.ViewPosition = view
    dataset.PatientOrientation = ["L", "F"]  # columns run to the patient's left, rows to the feet
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"


def _describe_digital_xray(dataset: FileDataset, size: int, inverted: bool) -> None:
    """Attributes that the DX object must have and the CR object need not."""
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.ImageLaterality = "U"
    dataset.AnatomicRegionSequence = [_code("51185008", "SCT", "Chest")]
    dataset.ViewCodeSequence = [_code("399348003", "SCT", "postero-anterior")]
    dataset.ViewCodeSequence[0].ViewModifierCodeSequence = []
    dataset.AcquisitionContextSequence = []
    dataset.DetectorType, dataset.DetectorConfiguration = "DIRECT", "AREA"
    dataset.PositionerType = "NONE"
    dataset.ImagerPixelSpacing = [round(_DETECTOR_WIDTH_MM / size, 6)] * 2
    dataset.PixelIntensityRelationship = "LOG"
    # -1: a higher stored value means that fewer X-rays arrived, as behind bone when bone is stored bright.
    dataset.PixelIntensityRelationshipSign = 1 if inverted else -1
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "US"
    dataset.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    dataset.WindowCenter, dataset.WindowWidth = str((_MAX_STORED + 1) // 2), str(_MAX_STORED + 1)


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _store_pixels(dataset: FileDataset, picture: np.ndarray, inverted: bool) -> None:
    stored = np.rint(picture * _MAX_STORED).astype("<u2")
    if inverted:
        stored = (_MAX_STORED - stored).astype("<u2")
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PixelData = stored.tobytes()
