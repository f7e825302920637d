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

import pickle
from collections.abc import Callable
from pathlib import Path

import monai.engines
import monai.handlers
import monai.networks.nets
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.data import CacheDataset, MetaTensor, PersistentDataset, list_data_collate, set_track_meta
from monai.transforms import Compose, LoadImaged, Resized, ScaleIntensityd
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset

from monai_privacy.data import chest_xray, chest_xray_transforms, splits, synthetic
from monai_privacy.data.chest_xray_transforms import LoadChestXRay, LoadChestXRayd
from monai_privacy.data.synthetic import write_synthetic_chest_xrays

ROWS, COLUMNS = 5, 7
PICTURE = (np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 7).astype(np.uint8)  # no symmetry


@pytest.fixture(scope="module")
def xray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_synthetic_chest_xrays(tmp_path_factory.mktemp("made") / "x", num_patients=2, image_size=32)
    return folder / "images" / "000000.dcm"


def write_dicom(template: Path, path: Path, stored: np.ndarray, **attributes: object) -> Path:
    dataset = pydicom.dcmread(template)
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.BitsStored = dataset.BitsAllocated = 8 * stored.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PhotometricInterpretation = "MONOCHROME2"
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset["PixelData"].VR = "OB" if stored.dtype.itemsize == 1 else "OW"
    dataset.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    dataset.save_as(path)
    return path


def write_nifti(path: Path, picture: np.ndarray, extra_axes: int = 1) -> None:
    values = picture.T.reshape(*picture.T.shape, *[1] * extra_axes)
    nib.save(nib.Nifti1Image(values.astype(np.int16), np.diag([-1.0, -1.0, 1.0, 1.0])), path)


def write_raster(path: Path, picture: np.ndarray, mode: str) -> None:
    gray = Image.fromarray(picture)
    if mode == "RGBA":
        alpha = Image.fromarray(np.where(picture > 99, 0, 255).astype(np.uint8))
        gray = Image.merge("RGBA", (gray, gray, gray, alpha))
    elif mode == "LA":
        gray = Image.merge("LA", (gray, Image.new("L", gray.size, 0)))
    elif mode != "L":
        gray = gray.convert(mode)
    gray.save(path)


def write(kind: str, folder: Path, xray: Path) -> Path:
    path = folder / kind
    name, _, detail = kind.partition(":")
    path = folder / name
    if name.startswith("dicom"):
        inverted = detail == "MONOCHROME1"
        write_dicom(xray, path, np.uint8(255) - PICTURE if inverted else PICTURE, PhotometricInterpretation=detail)
    elif name.endswith(("nii", "nii.gz")):
        write_nifti(path, PICTURE, int(detail))
    else:
        write_raster(path, PICTURE, detail)
    return path


FORMATS = [
    "dicom:MONOCHROME2", "dicom.dcm:MONOCHROME1", "a.nii:0", "a.nii.gz:1", "a.nii.gz:2",
    "a.png:L", "a.png:LA", "a.png:RGB", "a.png:RGBA", "a.png:P", "a.png:I;16", "a.bmp:L",
]  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_image(kind: str, tmp_path: Path, xray: Path) -> None:
    path = write(kind, tmp_path, xray)
    loaded = LoadChestXRayd("image")({"image": str(path), "label": 1})
    assert loaded["label"] == 1
    image = loaded["image"]
    assert isinstance(image, MetaTensor)
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image.numpy(), PICTURE.T[None], rtol=1e-6)


@pytest.mark.parametrize("kind", ["dicom.dcm:MONOCHROME2", "a.nii.gz:0", "a.png:L"])
def test_orientation_is_that_of_monais_own_loader(kind: str, tmp_path: Path, xray: Path) -> None:
    data = {"image": str(write(kind, tmp_path, xray))}
    theirs = LoadImaged("image", image_only=True, ensure_channel_first=True)(data)["image"]
    np.testing.assert_array_equal(LoadChestXRayd("image")(data)["image"].numpy(), theirs.numpy())


def test_jpeg_colour_and_gray(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 32 * 16).reshape(16, 32).astype(np.uint8)
    for mode in ("L", "RGB", "CMYK"):
        write_raster(tmp_path / f"{mode}.jpeg", smooth, mode)
        loaded = LoadChestXRay()(tmp_path / f"{mode}.jpeg")
        assert loaded.shape == (1, 32, 16)
        assert abs(loaded.numpy()[0] - smooth.T).max() < 12


def test_sixteen_bits_are_kept(tmp_path: Path, xray: Path) -> None:
    deep = PICTURE.astype(np.uint16) * 250
    Image.fromarray(deep).save(tmp_path / "deep.png")
    write_dicom(xray, tmp_path / "deep.dcm", deep)
    for name in ("deep.png", "deep.dcm"):
        np.testing.assert_array_equal(LoadChestXRay()(tmp_path / name).numpy()[0], deep.T)


def test_monochrome1_with_sign_and_rescale(tmp_path: Path, xray: Path) -> None:
    signed = PICTURE.astype(np.int16) - 100
    options = {"RescaleSlope": "2", "RescaleIntercept": "-5", "BitsStored": 12, "HighBit": 11}
    plain = write_dicom(xray, tmp_path / "2.dcm", signed, **options)
    inverted = write_dicom(xray, tmp_path / "1.dcm", -1 - signed, PhotometricInterpretation="MONOCHROME1", **options)
    for path in (plain, inverted):
        np.testing.assert_allclose(LoadChestXRay()(path).numpy()[0], 2.0 * signed.T - 5.0)


def test_colour_becomes_gray(tmp_path: Path, xray: Path) -> None:
    colour = np.stack([PICTURE, PICTURE // 2, PICTURE // 3], axis=-1)
    options = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
    write_dicom(xray, tmp_path / "rgb.dcm", colour, **options)
    Image.fromarray(colour).save(tmp_path / "rgb.png")
    for name in ("rgb.dcm", "rgb.png"):
        loaded = LoadChestXRay()(tmp_path / name).numpy()[0]
        np.testing.assert_allclose(loaded, (colour @ np.array([0.299, 0.587, 0.114])).T, rtol=1e-5)
    gray = np.stack([PICTURE, np.full_like(PICTURE, 128), np.full_like(PICTURE, 128)], axis=-1)
    options["PhotometricInterpretation"] = "YBR_FULL"
    loaded = LoadChestXRay()(write_dicom(xray, tmp_path / "ybr.dcm", gray, **options)).numpy()[0]
    np.testing.assert_allclose(loaded, PICTURE.T, atol=1.0)


def test_compressed_dicom() -> None:
    path = get_testdata_file("693_J2KI.dcm", download=False)
    assert path is not None
    dataset = pydicom.dcmread(path)
    expected = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    np.testing.assert_allclose(LoadChestXRay()(path).numpy()[0], expected.T)


def test_array_records() -> None:
    image = LoadChestXRay()(PICTURE)
    np.testing.assert_array_equal(image.numpy(), PICTURE.T[None])
    with pytest.raises(ValueError, match="not that of one gray picture"):
        LoadChestXRay()(PICTURE[None])


def test_no_header_travels_with_the_image(xray: Path) -> None:
    image = LoadChestXRay()(xray)
    assert isinstance(image, MetaTensor)
    assert image.meta["filename_or_obj"] == str(xray)
    assert set(image.meta) <= {"filename_or_obj", "affine", "space"}
    assert torch.equal(image.affine, torch.eye(4, dtype=torch.float64))
    set_track_meta(False)
    try:
        assert type(LoadChestXRay()(xray)) is torch.Tensor
    finally:
        set_track_meta(True)


def test_in_monais_datasets(tmp_path: Path, xray: Path) -> None:
    records = [
        {"image": str(write(kind, tmp_path, xray)), "label": 0, "patient_id": kind}
        for kind in ("dicom:MONOCHROME1", "a.png:RGB", "b.nii.gz:1")
    ]
    steps = Compose([LoadChestXRayd("image"), ScaleIntensityd("image"), Resized("image", (8, 8))])
    steps = pickle.loads(pickle.dumps(steps))
    cached = CacheDataset(records, steps, progress=False)
    stored = PersistentDataset(records, steps, cache_dir=tmp_path / "cache")
    for _ in range(2):  # the second time from the cache on disk
        batches = [list_data_collate([data[index] for index in range(3)]) for data in (cached, stored)]
        assert batches[0]["image"].shape == (3, 1, 8, 8)
        assert batches[0]["patient_id"] == [record["patient_id"] for record in records]
        torch.testing.assert_close(torch.as_tensor(batches[0]["image"]), torch.as_tensor(batches[1]["image"]))
    assert torch.allclose(batches[0]["image"][0], batches[0]["image"][2], atol=1e-6)


def test_missing_keys(xray: Path) -> None:
    assert LoadChestXRayd(["image", "other"], allow_missing_keys=True)({"image": xray})["image"].shape == (1, 32, 32)
    with pytest.raises(KeyError):
        LoadChestXRayd("other")({"image": xray})


def palette(dataset: FileDataset) -> None:
    dataset.PhotometricInterpretation = "PALETTE COLOR"


def save_changed(xray: Path, path: Path, change: Callable[[FileDataset], None]) -> None:
    dataset = pydicom.dcmread(xray)
    change(dataset)
    dataset.save_as(path)


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("none.png", lambda path, xray: None, "No such file"),
        ("none", lambda path, xray: None, "No such file"),
        ("bad.png", lambda path, xray: path.write_bytes(b"x"), "cannot identify image file"),
        ("bad.dcm", lambda path, xray: path.write_bytes(b"x"), "File is missing DICOM File Meta"),
        ("short.dcm", lambda path, xray: path.write_bytes(xray.read_bytes()[:-99]), "pixel data"),
        ("bad.nii.gz", lambda path, xray: path.write_bytes(b"x"), "not a gzip"),
        (
            "deep.nii.gz",
            lambda path, xray: write_nifti(path, np.zeros((6, 4))[:, None].repeat(3, 1)),
            r"shape \(4, 3, 6\) is not",
        ),
        (
            "palette.dcm",
            lambda path, xray: save_changed(xray, path, palette),
            "PALETTE COLOR is neither gray nor colour",
        ),
        ("empty.dcm", lambda path, xray: save_changed(xray, path, lambda d: d.__delitem__("PixelData")), "Pixel Data"),
        ("nan.nii.gz", lambda path, xray: nib.save(nib.Nifti1Image(np.full((4, 4), np.nan), None), path), "nan or inf"),
    ],
)
def test_errors_name_the_file(
    name: str, make: Callable[[Path, Path], object], reason: str, tmp_path: Path, xray: Path
) -> None:
    path = tmp_path / name
    make(path, xray)
    with pytest.raises(ValueError, match=reason) as caught:
        LoadChestXRayd("image")({"image": str(path)})
    message = str(caught.value)
    assert message.startswith(f"image {path} cannot be loaded (")
    assert message.endswith("Replace the file, or take it out of the list.")
    assert "\n" not in message


def test_no_name_repeats_one_of_monais() -> None:
    # MONAI's config parser finds our classes by their short names too, so a repeated name breaks other bundles.
    ours = [name for module in (chest_xray, chest_xray_transforms, splits, synthetic) for name in module.__all__]
    theirs = (monai.transforms, monai.data, monai.networks.nets, monai.engines, monai.handlers, monai.utils)
    assert ours
    assert not [name for name in ours for package in theirs if hasattr(package, name)]
