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
"""Transforms for CT volumes: load in HU, cut out a finding, and see a volume several times."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelReader, get_track_meta
from monai.transforms import MapTransform, RandomizableTrait, Transform
from pydicom.pixels import pixel_array
from torch import Tensor

from monai_privacy.data.ct import CENTER_KEY
from monai_privacy.data.dicom_series import Slice, slices_of
from monai_privacy.data.image_files import image_format, one_line

__all__ = [
    "CropAroundFinding",
    "CropAroundFindingD",
    "CropAroundFindingDict",
    "CropAroundFindingd",
    "LoadCT",
    "LoadCTD",
    "LoadCTDict",
    "LoadCTd",
    "RepeatViewsD",
    "RepeatViewsDict",
    "RepeatViewsd",
]

# DICOM's axes run to the left, back and head; NIfTI's and MONAI's to the right, front and head.
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_AIR_HU = -1000.0


class LoadCT(Transform):
    """Load a CT volume in Hounsfield units as a float32 image of shape (1, X, Y, Z).

    DICOM slices are taken in the order in which they are given, brought to HU by the rescale of each, and placed by
    their positions: the affine has spacing, orientation, and a gantry tilt as the shear that it is, so that ``Spacingd``
    and ``Orientationd`` undo it. NIfTI files must hold HU already. What a file says is finer than HU (pixel padding, air
    outside of the field of view) is left: put a fixed window after it.

    The result is a ``MetaTensor`` (a plain tensor after ``monai.data.set_track_meta(False)``) with the affine and
    ``filename_or_obj`` alone, so nothing of a DICOM header (dates, names, ids) travels with the image into caches,
    outputs or logs.
    """

    def __call__(self, image: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Tensor:
        """
        Args:
            image: a NIfTI file, a DICOM file of one or many frames, or the files of a series in their order.

        Raises:
            ValueError: naming the file, if it cannot be read as a volume.
        """
        paths = [Path(image)] if isinstance(image, (str, os.PathLike)) else [Path(one) for one in image]
        try:
            values, affine = _nifti(paths[0]) if image_format(paths[0]) == "nifti" else _series(paths)
            if not np.isfinite(values).all():
                raise ValueError("it has voxels that are nan or infinite")
        except Exception as error:  # each package raises kinds of its own for a damaged file
            raise ValueError(
                f"volume {paths[0] if paths else image} cannot be loaded ({one_line(error) or type(error).__name__}). "
                "Replace the file, or take it out of the list."
            ) from error
        tensor = torch.from_numpy(np.ascontiguousarray(values[None], dtype=np.float32))
        if not get_track_meta():
            return tensor
        return MetaTensor(tensor, affine=torch.from_numpy(affine), meta={"filename_or_obj": str(paths[0])})


class LoadCTd(MapTransform):
    """Dictionary version of :py:class:`LoadCT`, in place of ``LoadImaged`` and ``EnsureChannelFirstd``.

    Args:
        keys: the keys whose values are paths or lists of paths.
        allow_missing_keys: do not raise for a key that is missing.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.loader = LoadCT()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            loaded[key] = self.loader(loaded[key])
        return loaded


class CropAroundFinding(Transform):
    """Cut a box out of a volume around a place in the patient; what lies outside of the volume is air.

    Args:
        spatial_size: voxels along each axis, of the volume as it is then: bring it to a fixed spacing first.
        pad_value: what lies outside, in HU.
    """

    def __init__(self, spatial_size: Sequence[int] | int, pad_value: float = _AIR_HU) -> None:
        self.spatial_size = (spatial_size,) * 3 if isinstance(spatial_size, int) else tuple(spatial_size)
        self.pad_value = pad_value

    def __call__(self, image: Tensor, center: Sequence[float] | None = None) -> Tensor:
        """
        Args:
            image: (C, X, Y, Z), a MetaTensor where there is a center.
            center: (3,) millimetres to the left, back and head, as DICOM has them; the middle of the volume where None.
        """
        middle = [(size - 1) / 2 for size in image.shape[1:]]
        if center is not None:
            if not isinstance(image, MetaTensor):
                raise ValueError(
                    "the image is a plain tensor, so where the finding lies in it is unknown. Crop before the meta data "
                    "are dropped, with set_track_meta(True)."
                )
            place = _LPS_TO_RAS @ np.array([*center, 1.0])
            middle = (np.linalg.inv(np.asarray(image.affine, dtype=np.float64)) @ place)[:3].tolist()
        corner = [round(at - (size - 1) / 2) for at, size in zip(middle, self.spatial_size, strict=True)]
        result = torch.full(
            (image.shape[0], *self.spatial_size), self.pad_value, dtype=image.dtype, device=image.device
        )
        within, box = [slice(None)], [slice(None)]
        for start, size, length in zip(corner, self.spatial_size, image.shape[1:], strict=True):
            first, last = max(0, start), min(length, start + size)
            within.append(slice(first, max(first, last)))
            box.append(slice(first - start, max(first, last) - start))
        if any(part.stop <= part.start for part in within[1:]):
            raise ValueError(
                f"the finding at {list(center or ())} lies outside of the volume of shape {tuple(image.shape[1:])}. "
                "Correct its place, in millimetres to the left, back and head."
            )
        result[tuple(box)] = torch.as_tensor(image)[tuple(within)]
        if not isinstance(image, MetaTensor):
            return result
        moved = np.asarray(image.affine, dtype=np.float64) @ _shift(corner)
        # An affine in the meta data would win over the one that is given.
        meta = {key: value for key, value in image.meta.items() if key != "affine"}
        return MetaTensor(result, affine=torch.from_numpy(moved), meta=meta)


class CropAroundFindingd(MapTransform):
    """Dictionary version of :py:class:`CropAroundFinding`.

    Args:
        keys: of the volumes.
        spatial_size: see :py:class:`CropAroundFinding`.
        center_key: of the place of the finding; records without one are cropped around their middle.
        pad_value: see :py:class:`CropAroundFinding`.
        allow_missing_keys: do not raise for a key that is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int] | int,
        center_key: str = CENTER_KEY,
        pad_value: float = _AIR_HU,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.cropper = CropAroundFinding(spatial_size, pad_value)
        self.center_key = center_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        cropped = dict(data)
        for key in self.key_iterator(cropped):
            cropped[key] = self.cropper(cropped[key], cropped.get(self.center_key))
        # Not for collation: some records have it and others need not.
        cropped.pop(self.center_key, None)
        return cropped


class RepeatViewsd(Transform, RandomizableTrait):
    """Give each record ``num_views`` times, so that the random transforms after it make as many views of it.

    Augmentation multiplicity: the trainer averages the gradients of all views of a patient before it clips, so that
    several views lower the noise of augmentation at no cost in privacy (De et al. 2022, section 3.2). A dataset that
    caches begins anew here.

    Args:
        num_views: K, at least 1.
    """

    def __init__(self, num_views: int) -> None:
        if num_views < 1:
            raise ValueError(f"num_views is {num_views}: a record is seen once at least. Give 1 or more.")
        self.num_views = num_views

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        # Copies: a random transform may write into its input.
        return [
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in data.items()}
            for _ in range(self.num_views)
        ]


CropAroundFindingD = CropAroundFindingDict = CropAroundFindingd
LoadCTD = LoadCTDict = LoadCTd
RepeatViewsD = RepeatViewsDict = RepeatViewsd


def _nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    reader = NibabelReader()
    values, meta = reader.get_data(reader.read(path))
    if values.ndim != 3:
        raise ValueError(f"shape {values.shape} is not that of one volume")
    return np.asarray(values), np.asarray(meta["affine"], dtype=np.float64)


def _series(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    if not paths:
        raise ValueError("the list of slices is empty")
    planes: list[np.ndarray] = []
    slices: list[Slice] = []
    for path in paths:
        dataset = pydicom.dcmread(path)
        pixels = np.asarray(pixel_array(dataset), dtype=np.float32)
        own = slices_of(dataset)
        for plane, one in zip(pixels[None] if pixels.ndim == 2 else pixels, own, strict=True):
            planes.append(plane * one.slope + one.intercept)
            slices.append(one)
    order = sorted(range(len(slices)), key=lambda index: slices[index].height)
    slices = [slices[index] for index in order]
    # Pixels are stored row by row: transposed, the first axis runs along a row.
    volume = np.stack([planes[index].T for index in order], axis=-1)
    return volume, _LPS_TO_RAS @ _affine(slices)


def _affine(slices: Sequence[Slice]) -> np.ndarray:
    """(4, 4) from voxels to millimetres in DICOM's axes."""
    first, last = slices[0], slices[-1]
    affine = np.eye(4)
    affine[:3, 0] = np.multiply(first.across, first.spacing[0])
    affine[:3, 1] = np.multiply(first.down, first.spacing[1])
    if len(slices) > 1:
        affine[:3, 2] = np.subtract(last.position, first.position) / (len(slices) - 1)
    else:
        affine[:3, 2] = first.normal * (first.thickness if first.thickness > 0.0 else 1.0)
    affine[:3, 3] = first.position
    return affine


def _shift(corner: Sequence[int]) -> np.ndarray:
    moved = np.eye(4)
    moved[:3, 3] = corner
    return moved
