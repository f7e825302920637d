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

"""Single image files: what they are, and whether they can be read, without decoding their pixels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pydicom
from PIL import Image
from pydicom.dataset import FileDataset
from pydicom.pixels import get_decoder

RASTER_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_NIFTI_SUFFIXES = (".nii", ".nii.gz")


def image_format(path: str | os.PathLike[str]) -> Literal["raster", "nifti", "dicom"]:
    """The format that a file's name tells; DICOM files often have no suffix, so all others count as DICOM."""
    name = os.fspath(path).lower()
    if name.endswith(RASTER_SUFFIXES):
        return "raster"
    return "nifti" if name.endswith(_NIFTI_SUFFIXES) else "dicom"


def read_dicom_header(path: str | os.PathLike[str], *, several_frames: bool = False) -> FileDataset:
    """Read a DICOM file up to its pixels, and check without reading them that they are there and can be decoded.

    Raises:
        ValueError: naming the file, if it is no DICOM file, or not one gray or colour picture that can be decoded here
            (or, where asked for, several).
    """
    try:
        with open(path, "rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True)
            start, tag = file.tell(), file.read(4)
        problem = _pixel_problem(Path(path), header, start, tag, several_frames)
    except Exception as error:  # pydicom raises many kinds for a damaged file
        problem = one_line(error) or type(error).__name__
    if problem:
        raise ValueError(f"DICOM file {path} cannot be used: {problem}. Replace the file, or leave it out.")
    return header


def _pixel_problem(path: Path, header: FileDataset, start: int, tag: bytes, several_frames: bool) -> str | None:
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        return "it names no transfer syntax"
    if syntax.is_deflated:  # the position in the file means nothing then, and the whole must be unpacked
        has_pixels = "PixelData" in pydicom.dcmread(path)
    else:
        has_pixels = tag == (b"\xe0\x7f\x10\x00" if syntax.is_little_endian else b"\x7f\xe0\x00\x10")
    if not has_pixels:
        return "it has no pixel data (a report or a DICOMDIR, perhaps)"
    frames = int(header.get("NumberOfFrames") or 1)
    if frames != 1 and not several_frames:
        return f"it has {frames} frames, not one picture"
    if not get_decoder(syntax).is_available:
        return f"no installed package decodes {syntax.name} (install pylibjpeg with its plugins, or gdcm)"
    bits = header.Rows * header.Columns * header.get("SamplesPerPixel", 1) * header.BitsAllocated * frames
    if not syntax.is_compressed and not syntax.is_deflated and os.path.getsize(path) - start < bits // 8:
        return "it ends before its last pixel"
    return None


def check_raster(path: Path) -> None:
    try:
        with Image.open(path):  # reads the header only
            pass
    except Exception as error:
        raise ValueError(
            f"image file {path} cannot be read ({one_line(error)}). Download it again, or remove it."
        ) from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
