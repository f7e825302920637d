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

"""Load a chest X-ray of any format into one shape, orientation and polarity."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelReader, get_track_meta
from monai.transforms import MapTransform, Transform
from PIL import Image
from pydicom.pixels import apply_modality_lut

from monai_privacy.data.image_files import image_format

__all__ = ["LoadChestXRay", "LoadChestXRayD", "LoadChestXRayDict", "LoadChestXRayd"]

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as PIL converts colour to gray


class LoadChestXRay(Transform):
    """Load one chest X-ray as a float32 image of shape (1, W, H), bone bright.

    Use it in place of ``LoadImage``, which leaves MONOCHROME1 files inverted, and gives colour files three channels
    and NIfTI a third dimension. DICOM, PNG, JPEG, BMP and NIfTI come out alike: the first spatial axis runs along the
    columns of the picture, the second along its rows, as ``LoadImage`` has them. Colour becomes gray, transparency is
    ignored, DICOM's rescale slope or modality table is applied and its display window is not. Values are not
    normalised: DICOM's are those stored, PNG's 0..255 or 0..65535, so scale each image afterwards. The affine of a
    NIfTI file is not applied: a projection has no slice position, and converters fill it in differently.

    The result is a ``MetaTensor`` (a plain tensor after ``monai.data.set_track_meta(False)``), because MONAI's savers
    take the file name from its meta data. It holds ``filename_or_obj`` and an affine of identity alone, so nothing of
    a DICOM header (dates, names, ids) travels with the image into caches, outputs or logs.
    """

    def __call__(self, image: str | os.PathLike[str] | np.ndarray) -> torch.Tensor:
        """
        Args:
            image: a path, or a picture that lies in an array already, (H, W), as ``read_chest_xrays`` gives for npz.

        Raises:
            ValueError: naming the file, if it cannot be read as one picture.
        """
        if isinstance(image, np.ndarray):
            name, picture = "", _one_picture(image).T
        else:
            name, picture = os.fspath(image), _load(Path(image).expanduser())
        values = torch.from_numpy(np.ascontiguousarray(picture[None]))
        if not get_track_meta():
            return values
        return MetaTensor(values, affine=torch.eye(4, dtype=torch.float64), meta={"filename_or_obj": name})


class LoadChestXRayd(MapTransform):
    """Dictionary version of :py:class:`LoadChestXRay`, in place of ``LoadImaged`` and ``EnsureChannelFirstd``.

    Args:
        keys: the keys whose values are paths or arrays.
        allow_missing_keys: do not raise for a key that is missing.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.loader = LoadChestXRay()

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            loaded[key] = self.loader(loaded[key])
        return loaded


LoadChestXRayD = LoadChestXRayDict = LoadChestXRayd


def _load(path: Path) -> np.ndarray:
    """The picture in a file, (W, H)."""
    try:
        kind = image_format(path)
        if kind == "nifti":
            return _one_picture(_load_nifti(path))
        return _one_picture(_load_dicom(path) if kind == "dicom" else _load_raster(path)).T
    except Exception as error:  # each package raises kinds of its own for a damaged file
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(
            f"image {path} cannot be loaded ({reason}). Replace the file, or take it out of the list."
        ) from error


def _one_picture(values: np.ndarray) -> np.ndarray:
    if values.ndim != 2:
        raise ValueError(f"shape {values.shape} is not that of one gray picture")
    picture = np.asarray(values, dtype=np.float32)
    if not np.isfinite(picture).all():
        raise ValueError("it has pixels that are nan or infinite, which would spread to the whole image when scaled")
    return picture


def _load_dicom(path: Path) -> np.ndarray:
    dataset = pydicom.dcmread(path)
    kind = dataset.PhotometricInterpretation
    pixels = dataset.pixel_array  # YBR colours become RGB
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        if pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise ValueError(f"photometric interpretation {kind} is neither gray nor colour")
        return pixels @ _LUMA
    values = np.asarray(apply_modality_lut(pixels, dataset), dtype=np.float64)
    if kind == "MONOCHROME1":
        # Low is bright in these. Reversing the range that could be stored, not the one that was, keeps the values of
        # the two kinds comparable.
        signed = dataset.PixelRepresentation == 1
        lowest = -(2 ** (dataset.BitsStored - 1)) if signed else 0
        ends = np.array([lowest, lowest + 2**dataset.BitsStored - 1], dtype=np.int32)
        values = np.asarray(apply_modality_lut(ends, dataset), dtype=np.float64).sum() - values
    return values


def _load_raster(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode == "L" or image.mode.startswith(("I", "F")):  # 16 and 32 bits, which "L" would cut off
            return np.asarray(image)
        return np.asarray(image.convert("RGB")) @ _LUMA  # drops transparency, looks palettes up


def _load_nifti(path: Path) -> np.ndarray:
    reader = NibabelReader()
    values, _ = reader.get_data(reader.read(path))
    while values.ndim > 2 and values.shape[-1] == 1:
        values = values[..., 0]
    return values
