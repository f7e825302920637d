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
"""Find the CT series in a tree of DICOM files: which slices make a volume, in which order, and whose it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.misc import is_dicom
from pydicom.uid import MediaStorageDirectoryStorage

from monai_privacy.data.image_files import read_dicom_header
from monai_privacy.data.synthetic import says_synthetic
from monai_privacy.data.tables import is_hidden

__all__ = ["CTSeries", "CTTree", "Slice", "read_ct_series", "slices_of"]

_SCOUTS = ("LOCALIZER", "SCOUT")
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# Two slices at one place; of rounding in the headers, a hundredth of a millimetre is far above.
_SAME_PLACE_MM = 0.01
_TILT_DEGREES = 0.5
# How far a slice may lie beside the straight line through the others.
_ASIDE_MM = 1.0
# Two people, two visits or two scans under one series are no volume.
_ONE_A_SERIES = ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID", "FrameOfReferenceUID")


@dataclass(frozen=True)
class Slice:
    """One slice of a CT: where it lies, in DICOM's patient coordinates (millimetres to the left, back and head).

    Args:
        position: (3,) of the centre of the first pixel.
        across: (3,) unit vector along a row of pixels.
        down: (3,) unit vector along a column.
        spacing: distance of pixels along ``across`` and along ``down``, in millimetres.
        thickness: in millimetres, nan where unknown.
        slope: of the rescale to HU.
        intercept: of the rescale to HU.
    """

    position: tuple[float, ...]
    across: tuple[float, ...]
    down: tuple[float, ...]
    spacing: tuple[float, float]
    thickness: float
    slope: float
    intercept: float

    @property
    def normal(self) -> np.ndarray:
        """(3,) unit vector from slice to slice; towards the head where slices are axial."""
        return np.cross(self.across, self.down)

    @property
    def height(self) -> float:
        """Position along the normal, in millimetres."""
        return float(np.dot(self.position, self.normal))


@dataclass(frozen=True)
class CTSeries:
    """A volume.

    Args:
        uid: its SeriesInstanceUID.
        files: its slices in the order of their position, from feet to head where they are axial; one file where that
            holds many frames.
        patient_id: PatientID of its files, perhaps empty.
        synthetic: whether every file says that it is synthetic.
        notices: what is odd about it: gantry tilt, missing slices.
        study: its StudyInstanceUID, perhaps empty.
    """

    uid: str
    files: tuple[Path, ...]
    patient_id: str
    synthetic: bool
    notices: tuple[str, ...] = ()
    study: str = ""


@dataclass(frozen=True)
class CTTree:
    """What a folder has.

    Args:
        series: the volumes, in the order of their files' names.
        notices: files and series that were left out, and what is odd about those that were not; one line each.
    """

    series: tuple[CTSeries, ...]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    path: Path
    header: Dataset
    slices: tuple[Slice, ...]

    @property
    def grid(self) -> tuple[Any, ...]:
        """What the slices of one volume have in common: orientation to a thousandth, size, and spacing."""
        return (*_plane(self.slices[0]), int(self.header.Rows), int(self.header.Columns))


def _plane(one: Slice) -> tuple[float, ...]:
    return tuple(round(value, 3) + 0.0 for value in (*one.across, *one.down, *one.spacing))


class _NoSliceError(Exception):
    """A sound file that is no slice of a CT volume."""


def read_ct_series(folder: Path, *, strict: bool = False) -> CTTree:
    """Group the DICOM files below a folder into CT series; pixels stay unread.

    Files are grouped by SeriesInstanceUID and ordered by their position in the patient, not by name or number. Left out,
    with a notice: scouts, objects without pixels or position (reports, screen captures), other modalities, copies of a
    file, files that cannot be read, and series that are no single volume: two patients under one series, several slices
    at one place, or values that cannot be brought to HU. A gantry tilt, missing slices and uneven spacing are noticed; the
    loader puts a tilt into the affine.

    Args:
        folder: any folder; hidden files and files of other kinds in it are passed over.
        strict: raise for the first file that cannot be read or used.

    Raises:
        ValueError: with ``strict``, naming the file.
    """
    found: dict[str, list[_File]] = {}
    notices: list[str] = []
    left_out: Counter[str] = Counter()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not is_hidden(p.relative_to(folder))):
        if path.suffix.lower() not in _DICOM_SUFFIXES and not is_dicom(path):
            continue
        try:
            file = _read_file(path)
        except _NoSliceError as reason:
            left_out[str(reason)] += 1
        except ValueError as error:
            if strict:
                raise
            notices.append(str(error))
        else:
            found.setdefault(str(file.header.SeriesInstanceUID), []).append(file)
    notices += [f"{count} DICOM files below {folder} were left out: {reason}" for reason, count in left_out.items()]
    series = []
    for uid, files in found.items():
        try:
            made = _make_series(uid, files)
        except ValueError as error:
            if strict:
                raise
            notices.append(str(error))
        else:
            series.append(made)
            notices += made.notices
    return CTTree(tuple(series), tuple(notices))


def slices_of(header: Dataset) -> tuple[Slice, ...]:
    """The slices of a DICOM file, one for each frame.

    Raises:
        ValueError: where place or rescale are missing.
    """
    return tuple(_slice(header, groups) for groups in _functional_groups(header))


def _read_file(path: Path) -> _File:
    try:
        header = read_dicom_header(path, several_frames=True)
    except ValueError:
        if _is_no_picture(path):
            raise _NoSliceError("they hold no picture (reports, structures, a DICOMDIR)") from None
        raise
    modality = str(header.get("Modality") or "none")
    if modality != "CT":
        raise _NoSliceError(f"their modality is {modality}, not CT")
    if any(str(part).upper() in _SCOUTS for part in header.get("ImageType") or ()):
        raise _NoSliceError("they are scouts (localizers)")
    if "SeriesInstanceUID" not in header:
        raise ValueError(f"DICOM file {path} has no SeriesInstanceUID, so its volume is unknown. Replace the file.")
    try:
        slices = slices_of(header)
    except LookupError as error:
        if len(header.get("ImageType") or ()) > 1 and str(header.ImageType[1]).upper() == "SECONDARY":
            raise _NoSliceError("they have no place in the patient (screen captures)") from None
        raise ValueError(
            f"DICOM file {path} has no {error.args[0]}, so where its slice lies, or what its values are in HU, is "
            "unknown. Replace the file, or leave it out."
        ) from None
    return _File(path, header, slices)


def _is_no_picture(path: Path) -> bool:
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except Exception:
        return False
    return header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage or "Rows" not in header


def _functional_groups(header: Dataset) -> Iterator[tuple[Dataset, ...]]:
    """For each frame, where its attributes may stand, first choice first."""
    if int(header.get("NumberOfFrames") or 1) == 1 and "PerFrameFunctionalGroupsSequence" not in header:
        yield (header,)
        return
    shared = tuple(header.get("SharedFunctionalGroupsSequence") or ())
    frames = header.get("PerFrameFunctionalGroupsSequence")
    if not frames:
        raise LookupError("PerFrameFunctionalGroupsSequence")
    for frame in frames:
        groups = []
        for group in (frame, *shared):
            # Each attribute lies in a sequence of one item of its own macro.
            groups += [element.value[0] for element in group if element.VR == "SQ" and element.value]
        yield (*groups, header)


def _slice(header: Dataset, groups: Sequence[Dataset]) -> Slice:
    def numbers(name: str, default: tuple[float, ...] | None = None) -> tuple[float, ...]:
        for group in groups:
            value = group.get(name)
            if value is not None and value != "":
                values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
                found = tuple(float(item) for item in values)
                if found and all(math.isfinite(item) for item in found):
                    return found
        if default is None:
            raise LookupError(name)
        return default

    orientation = numbers("ImageOrientationPatient")
    spacing = numbers("PixelSpacing")
    if len(orientation) != 6 or len(spacing) != 2 or min(spacing) <= 0.0:
        raise LookupError("valid ImageOrientationPatient and PixelSpacing")
    across, down = np.array(orientation[:3]), np.array(orientation[3:])
    if abs(across @ across - 1) > 0.01 or abs(down @ down - 1) > 0.01 or abs(across @ down) > 0.01:
        raise LookupError("ImageOrientationPatient of two unit vectors at a right angle")
    kinds = [str(group.get("RescaleType")).strip().upper() for group in groups if group.get("RescaleType")]
    if kinds and kinds[0] != "HU":
        raise LookupError(f"rescale to HU (its RescaleType is {kinds[0]})")
    if numbers("RescaleSlope")[0] == 0.0:
        raise LookupError("RescaleSlope other than 0")
    position = numbers("ImagePositionPatient")
    if len(position) != 3:
        raise LookupError("valid ImagePositionPatient")
    return Slice(
        position=position,
        across=orientation[:3],
        down=orientation[3:],
        # DICOM gives the distance of rows first.
        spacing=(spacing[1], spacing[0]),
        thickness=numbers("SliceThickness", (math.nan,))[0],
        slope=numbers("RescaleSlope")[0],
        intercept=numbers("RescaleIntercept")[0],
    )


def _make_series(uid: str, files: Sequence[_File]) -> CTSeries:
    where = f"series of {files[0].path}"
    notices: list[str] = []
    for name in _ONE_A_SERIES:
        values = {str(file.header.get(name) or "").strip() for file in files}
        if len(values) > 1:
            raise ValueError(
                f"{where} was left out: its files have {len(values)} different values of {name}, so whose it is, or where "
                "its slices lie, is unknown. Correct the headers."
            )
    files = _without_copies(files, where, notices)
    files = _of_one_grid(files, where, notices)
    if any(_plane(one) != _plane(file.slices[0]) for file in files for one in file.slices):
        raise ValueError(
            f"{where} was left out: its frames have several orientations or spacings, so they are no single volume. Give "
            "each volume a file of its own."
        )
    if any(len(file.slices) > 1 for file in files) and len(files) > 1:
        raise ValueError(
            f"{where} was left out: {len(files)} files of several frames each are not one volume. Give each a series of "
            "its own."
        )
    files = sorted(files, key=lambda file: file.slices[0].height)
    slices = sorted((one for file in files for one in file.slices), key=lambda one: one.height)
    notices += _geometry_notices(slices, where)
    return CTSeries(
        uid,
        tuple(file.path for file in files),
        str(files[0].header.get("PatientID") or "").strip(),
        all(says_synthetic(file.header) for file in files),
        tuple(notices),
        str(files[0].header.get("StudyInstanceUID") or "").strip(),
    )


def _without_copies(files: Sequence[_File], where: str, notices: list[str]) -> list[_File]:
    by_uid = {str(file.header.get("SOPInstanceUID") or file.path): file for file in reversed(files)}
    if len(by_uid) < len(files):
        notices.append(f"{where}: {len(files) - len(by_uid)} copies of a file (the same SOPInstanceUID) were left out")
    return [by_uid[uid] for uid in reversed(by_uid)]


def _of_one_grid(files: list[_File], where: str, notices: list[str]) -> list[_File]:
    grids = Counter(file.grid for file in files)
    most, count = grids.most_common(1)[0]
    if count < len(files):
        notices.append(
            f"{where}: {len(files) - count} of {len(files)} files have another orientation, size or spacing than the "
            "others, and were left out"
        )
    return [file for file in files if file.grid == most]


def _geometry_notices(slices: Sequence[Slice], where: str) -> Iterator[str]:
    if len(slices) == 1:
        yield f"{where}: it is a single slice"
        return
    gaps = np.diff([one.height for one in slices])
    if gaps.min() < _SAME_PLACE_MM:
        raise ValueError(
            f"{where} was left out: it has several slices at one place (scanned twice, or over time), so they are no "
            "single volume. Give each volume a series of its own."
        )
    if _aside(slices) > _ASIDE_MM:
        raise ValueError(
            f"{where} was left out: its slices do not lie on one straight line (one is {_aside(slices):.0f} mm aside), so "
            "one affine cannot place them. Give each volume a series of its own."
        )
    usual = float(np.median(gaps))
    missing = int(sum(round(gap / usual) - 1 for gap in gaps if gap > 1.5 * usual))
    if missing:
        yield f"{where}: {missing} slices seem to be missing among {len(slices)}, {usual:g} mm apart"
    elif np.abs(gaps - usual).max() > 0.1 * usual:
        yield f"{where}: its slices are not evenly spaced ({gaps.min():.3g} to {gaps.max():.3g} mm)"
    tilt = _tilt(slices)
    if tilt > _TILT_DEGREES:
        yield f"{where}: the gantry was tilted by {tilt:.1f} degrees; the loader's affine has the tilt"


def _aside(slices: Sequence[Slice]) -> float:
    """Millimetres by which a slice lies beside the line from the first to the last, at its own height."""
    heights = np.array([one.height for one in slices])
    positions = np.array([one.position for one in slices])
    share = ((heights - heights[0]) / (heights[-1] - heights[0]))[:, None]
    line = positions[0] + share * (positions[-1] - positions[0])
    return float(np.linalg.norm(positions - line, axis=1).max())


def _tilt(slices: Sequence[Slice]) -> float:
    """Degrees between the slices' normal and the direction in which they follow each other."""
    way = np.subtract(slices[-1].position, slices[0].position)
    cosine = abs(np.dot(way, slices[0].normal)) / np.linalg.norm(way)
    return math.degrees(math.acos(min(1.0, float(cosine))))
