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
"""CT volumes: from DICOM trees and NIfTI to records of patients, and from files to Hounsfield units in place."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose, LoadImage, RandFlipd, Spacing
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import UID, EnhancedCTImageStorage, RLELossless, generate_uid

from monai_privacy.data import (
    CropAroundFinding,
    CropAroundFindingd,
    LoadCT,
    LoadCTd,
    RepeatViewsd,
    SyntheticNodules,
    bundle_records,
    count_patients,
    read_ct_series,
    read_ct_volumes,
    write_datalist,
    write_synthetic_ct,
)

# Studies of real patients, in the pydicom wheel: CT, MR, scouts, a DICOMDIR.
REAL = Path(get_testdata_file("CT_small.dcm")).parent / "dicomdirtests"


@pytest.fixture(scope="module")
def dicom(tmp_path_factory) -> Path:
    return write_synthetic_ct(tmp_path_factory.mktemp("ct") / "dicom", num_patients=12)


@pytest.fixture
def tree(dicom, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(dicom, tmp_path / "tree"))


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def series_folder(tree: Path, *, at_least: int = 4) -> Path:
    """One series of so many slices at least, without a scout."""
    folders = [folder for folder in sorted((tree / "images").iterdir()) if not (folder / "scout.dcm").exists()]
    return next(folder for folder in folders if len(list(folder.iterdir())) >= at_least)


def change(path: Path, **values: object) -> None:
    dataset = pydicom.dcmread(path)
    for name, value in values.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)


def aside(path: Path, millimetres: float) -> None:
    """Move a slice that is neither the lowest nor the highest sideways."""
    heights = {file: float(pydicom.dcmread(file).ImagePositionPatient[2]) for file in path.parent.iterdir()}
    middle = sorted(heights, key=lambda file: heights[file])[1]
    x, y, z = pydicom.dcmread(middle).ImagePositionPatient
    change(middle, ImagePositionPatient=[float(x) + millimetres, y, z])


# ------------------------------------------------------------------ series


def test_slices_are_ordered_by_position_whatever_their_names(dicom):
    for series in read_ct_series(dicom).series:
        heights = [float(pydicom.dcmread(file).ImagePositionPatient[2]) for file in series.files]
        assert heights == sorted(heights)
        assert [file.name for file in series.files] != sorted(file.name for file in series.files) or len(heights) < 6


def test_scouts_are_left_out_and_said(dicom):
    tree = read_ct_series(dicom)
    scouts = list(dicom.rglob("scout.dcm"))
    assert scouts
    assert not {file.name for series in tree.series for file in series.files} & {"scout.dcm"}
    assert any("scouts" in notice and str(len(scouts)) in notice for notice in tree.notices)
    assert len(tree.series) == len(rows_of(dicom))


def test_a_missing_slice_is_noticed(tree):
    folder = series_folder(tree, at_least=6)
    series = next(s for s in read_ct_series(tree).series if s.files[0].parent == folder)
    series.files[2].unlink()
    (found,) = read_ct_series(folder).series
    assert "1 slices seem to be missing" in found.notices[0]


def test_a_tilted_gantry_is_noticed_and_in_the_affine(tree):
    folder = series_folder(tree)
    tilt = np.deg2rad(12.0)
    for path in folder.iterdir():
        change(path, ImageOrientationPatient=[1, 0, 0, 0, float(np.cos(tilt)), float(-np.sin(tilt))])
    (found,) = read_ct_series(folder).series
    assert "tilted by 12.0 degrees" in found.notices[0]
    affine = np.asarray(LoadCT()([str(file) for file in found.files]).affine)
    rows, table = affine[:3, 1] / np.linalg.norm(affine[:3, 1]), affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    assert rows @ table == pytest.approx(-np.sin(tilt), abs=1e-6)  # a right angle where nothing is tilted
    straight = Spacing(pixdim=(1.0, 1.0, 1.0))(LoadCT()([str(file) for file in found.files]))
    assert torch.isfinite(straight).all()


def test_copies_of_a_file_are_left_out(tree):
    folder = series_folder(tree)
    first = sorted(folder.iterdir())[0]
    count = len(list(folder.iterdir()))
    shutil.copy(first, folder / "copy.dcm")
    (found,) = read_ct_series(folder).series
    assert len(found.files) == count
    assert "1 copies" in found.notices[0]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: change(path, PatientID="another"), "2 different values of PatientID"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "ends before its last pixel"),
        (lambda path: path.write_bytes(b"no DICOM at all"), "cannot be used"),
        (lambda path: change(path, ImagePositionPatient=None), "has no ImagePositionPatient"),
        (lambda path: change(path, RescaleSlope=None), "has no RescaleSlope"),
        (lambda path: change(path, PixelSpacing=[0.0, 1.0]), "PixelSpacing"),
        (lambda path: change(path, StudyInstanceUID=generate_uid()), "2 different values of StudyInstanceUID"),
        (lambda path: change(path, PatientID="", PatientName="Other^One"), "2 different values of Patient"),
        (lambda path: change(path, RescaleType="US"), "RescaleType is US"),
        (lambda path: change(path, RescaleSlope=0), "RescaleSlope other than 0"),
        (lambda path: change(path, ImageOrientationPatient=[0.5, 0, 0, 0, 1, 0]), "unit vectors"),
        (lambda path: aside(path, 60.0), "straight line"),
    ],
)
def test_what_cannot_be_used_is_said_by_name_and_ends_only_a_strict_reading(tree, spoil, reason):
    path = sorted(series_folder(tree).iterdir())[1]
    all_series = len(read_ct_series(tree).series)
    spoil(path)
    found = read_ct_series(tree)
    notice = next(notice for notice in found.notices if reason in notice)
    assert str(path.parent) in notice
    assert "another" not in notice
    assert len(found.series) >= all_series - 1
    with pytest.raises(ValueError, match=reason):
        read_ct_series(tree, strict=True)


def test_several_slices_at_one_place_are_no_volume(tree):
    folder = series_folder(tree)
    one, other = sorted(folder.iterdir())[:2]
    change(other, ImagePositionPatient=list(pydicom.dcmread(one).ImagePositionPatient))
    found = read_ct_series(folder)
    assert not found.series
    assert "several slices at one place" in found.notices[0]


def test_other_modalities_and_reports_are_left_out(tree):
    folder = series_folder(tree)
    first, second = sorted(folder.iterdir())[:2]
    change(first, Modality="MR")
    report = pydicom.dcmread(second)
    for name in ("PixelData", "Rows", "Columns"):
        delattr(report, name)
    report.SOPInstanceUID = report.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    report.save_as(folder / "report.dcm", enforce_file_format=True)
    (folder / "notes.txt").write_text("no DICOM", encoding="utf-8")
    found = read_ct_series(folder)
    assert any("modality is MR" in notice for notice in found.notices)
    assert any("no picture" in notice for notice in found.notices)
    assert not any("notes.txt" in notice for notice in found.notices)
    assert len(found.series[0].files) == len(list(folder.iterdir())) - 3


# ------------------------------------------------------------------ loading


def test_dicom_and_nifti_of_the_same_volume_are_the_same(dicom, tmp_path):
    nifti = write_synthetic_ct(tmp_path / "nifti", num_patients=12, file_format="nifti")
    by_folder = {series.files[0].parent.name: series for series in read_ct_series(dicom).series}
    assert len(by_folder) == len(rows_of(nifti)) > 12
    for row in rows_of(nifti):
        one = LoadCT()([str(file) for file in by_folder[Path(row["file"]).name.removesuffix(".nii.gz")].files])
        other = LoadCT()(nifti / row["file"])
        assert one.shape == other.shape
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
        if "tilt" not in str(by_folder[Path(row["file"]).name.removesuffix(".nii.gz")].notices):
            np.testing.assert_allclose(one.affine[:3, :3], other.affine[:3, :3], atol=1e-5)


def test_the_order_in_which_files_are_given_does_not_matter(dicom):
    series = max(read_ct_series(dicom).series, key=lambda one: len(one.files))
    files = [str(file) for file in series.files]
    assert torch.equal(torch.as_tensor(LoadCT()(files)), torch.as_tensor(LoadCT()(files[::-1])))


def test_nothing_of_the_header_travels_with_the_image(dicom):
    series = read_ct_series(dicom).series[0]
    image = LoadCT()([str(file) for file in series.files])
    assert isinstance(image, MetaTensor)
    assert set(image.meta) <= {"filename_or_obj", "affine", "space"}
    assert series.patient_id not in str({k: v for k, v in image.meta.items() if k != "filename_or_obj"})


def test_real_series_are_as_monai_reads_them():
    folder = REAL / "98892001" / "CT5N"
    (series,) = read_ct_series(folder).series
    assert len(series.files) == 5
    ours = LoadCT()([str(file) for file in series.files])
    theirs = LoadImage(reader="PydicomReader", ensure_channel_first=True, image_only=True)(folder)
    assert ours.shape == theirs.shape
    same = torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    flipped = torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs).flip(-1))
    assert same or flipped
    if same:
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-3)


def test_a_real_tree_of_several_modalities():
    found = read_ct_series(REAL)
    assert [len(series.files) for series in found.series if series.files[0].parent.name == "CT5N"] == [5]
    assert all(series.patient_id for series in found.series)
    assert any("modality is MR" in notice for notice in found.notices)
    for series in found.series:
        image = LoadCT()([str(file) for file in series.files])
        assert image.shape[-1] == len(series.files)


def test_a_real_single_slice():
    image = LoadCT()(get_testdata_file("CT_small.dcm"))
    assert image.shape == (1, 128, 128, 1)
    assert -1100 < float(image.min()) < 0 < float(image.max())


def test_compressed_slices_are_read(tree):
    folder = series_folder(tree)
    (before,) = read_ct_series(folder).series
    plain = LoadCT()([str(file) for file in before.files])
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path, enforce_file_format=True)
    (after,) = read_ct_series(folder).series
    assert torch.equal(torch.as_tensor(plain), torch.as_tensor(LoadCT()([str(file) for file in after.files])))


def test_a_syntax_that_nothing_decodes_is_said(tree):
    folder = series_folder(tree)
    path = sorted(folder.iterdir())[0]
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.102")  # a film codec
    dataset.PixelData = encapsulate([bytes(100)])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    found = read_ct_series(folder)
    assert any(path.name in notice and "decode" in notice for notice in found.notices)


def enhanced(folder: Path, path: Path) -> None:
    """The slices of a folder as one file of many frames, last frame first."""
    (series,) = read_ct_series(folder).series
    slices = [pydicom.dcmread(file) for file in reversed(series.files)]
    whole = slices[0]
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    whole.NumberOfFrames = len(slices)
    frames = []
    for one in slices:
        position, plane = Dataset(), Dataset()
        position.ImagePositionPatient = one.ImagePositionPatient
        plane.PlanePositionSequence = Sequence([position])
        frames.append(plane)
    orientation, measures, rescale, shared = Dataset(), Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = whole.ImageOrientationPatient
    measures.PixelSpacing, measures.SliceThickness = whole.PixelSpacing, whole.SliceThickness
    rescale.RescaleSlope, rescale.RescaleIntercept = whole.RescaleSlope, whole.RescaleIntercept
    shared.PlaneOrientationSequence = Sequence([orientation])
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PixelValueTransformationSequence = Sequence([rescale])
    whole.PerFrameFunctionalGroupsSequence, whole.SharedFunctionalGroupsSequence = Sequence(frames), Sequence([shared])
    pixels = b"".join(one.PixelData for one in slices)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(whole, name)
    whole.PixelData = pixels
    whole.save_as(path, enforce_file_format=True)


def test_a_file_of_many_frames_is_the_same_volume(tree, tmp_path):
    folder = series_folder(tree)
    (series,) = read_ct_series(folder).series
    (tmp_path / "enhanced").mkdir()
    enhanced(folder, tmp_path / "enhanced" / "all.dcm")
    (found,) = read_ct_series(tmp_path / "enhanced").series
    assert found.files == (tmp_path / "enhanced" / "all.dcm",)
    one, other = LoadCT()(str(found.files[0])), LoadCT()([str(file) for file in series.files])
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-6)


def test_a_damaged_volume_is_named_when_it_is_loaded(tmp_path):
    (tmp_path / "x.nii.gz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x\.nii\.gz cannot be loaded"):
        LoadCT()(tmp_path / "x.nii.gz")


# ------------------------------------------------------------------ tables


def test_a_table_names_folders_and_patients(dicom):
    source = read_ct_volumes(dicom)
    rows = rows_of(dicom)
    assert (source.layout, source.unit, source.synthetic, source.kind) == ("dicom", "patient", True, "CT volumes")
    assert len(source.records) == len(rows)
    assert count_patients(source.records) == 12
    assert [record["label"] for record in source.records] == [int(row["label"]) for row in rows]


def test_series_can_be_named_by_their_uid(tree):
    uids = {series.files[0].parent.name: series.uid for series in read_ct_series(tree).series}
    rows = [
        {"series_uid": uids[Path(row["file"]).name], "target": row["label"], "patient_id": row["patient_id"]}
        for row in rows_of(tree)
    ]
    write_rows(tree, rows)
    assert len(read_ct_volumes(tree).records) == len(rows)


def test_the_patient_is_that_of_the_header_where_the_table_has_none(tree):
    write_rows(tree, [{"file": row["file"], "label": row["label"]} for row in rows_of(tree)])
    assert count_patients(read_ct_volumes(tree).records) == 12


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda rows: rows[0].update(patient_id="another"), "not the one in its DICOM header"),
        (lambda rows: rows[0].update(patient_id=""), "is empty"),
        (lambda rows: rows[0].update(label="2"), "neither 0 nor 1"),
        (lambda rows: rows[0].update(file="images/nowhere"), "does not exist"),
        (lambda rows: rows.append(dict(rows[0])), "a second time"),
        (lambda rows: rows[0].update(file="images"), "CT series, and any may be meant"),
    ],
)
def test_a_table_that_is_wrong_ends_the_reading(tree, spoil, reason):
    rows = rows_of(tree)
    spoil(rows)
    write_rows(tree, rows)
    with pytest.raises(ValueError, match=reason):
        read_ct_volumes(tree)


def test_one_volume_or_study_has_one_patient(tree):
    rows = rows_of(tree)
    write_rows(tree, [row | {"coordX": "0", "coordY": "0", "coordZ": "0"} for row in rows])
    for path in tree.rglob("*.dcm"):
        change(path, PatientID="")
    twice = [
        row | {"coordX": str(n), "coordY": "0", "coordZ": "0", "patient_id": f"P{n}"} for row in rows for n in (1, 2)
    ]
    write_rows(tree, twice)
    with pytest.raises(ValueError, match="to another patient than an earlier line"):
        read_ct_volumes(tree)
    several = next(row["patient_id"] for row in rows if sum(r["patient_id"] == row["patient_id"] for r in rows) > 1)
    first = next(index for index, row in enumerate(rows) if row["patient_id"] == several)
    write_rows(
        tree, [row | ({"patient_id": "somebody else"} if index == first else {}) for index, row in enumerate(rows)]
    )
    with pytest.raises(ValueError, match="same study, to another patient"):
        read_ct_volumes(tree)


def test_a_line_of_too_many_cells_is_named(tree):
    text = (tree / "labels.csv").read_text(encoding="utf-8").splitlines()
    (tree / "labels.csv").write_text("\n".join([text[0], text[1] + ",more,cells", *text[2:]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2 of .* has 2 cells more"):
        read_ct_volumes(tree)
    (tree / "labels.csv").write_text("\n".join([text[0], text[1] + ",", *text[2:]]), encoding="utf-8")
    assert len(read_ct_volumes(tree).records) == len(text) - 1


def test_an_unreadable_volume_is_left_out_and_named_unless_asked(tmp_path):
    folder = write_synthetic_ct(tmp_path / "nifti", num_patients=6, file_format="nifti")
    broken = folder / rows_of(folder)[0]["file"]
    broken.write_bytes(b"nothing")
    source = read_ct_volumes(folder)
    assert len(source.records) == len(rows_of(folder)) - 1
    assert any(str(broken) in notice for notice in source.notices)
    with pytest.raises(ValueError, match=broken.name):
        read_ct_volumes(folder, strict=True)


def test_another_column_may_hold_the_labels(tmp_path):
    folder = write_synthetic_ct(tmp_path / "nifti", num_patients=6, file_format="nifti")
    rows = [{"malignant" if key == "label" else key: value for key, value in row.items()} for row in rows_of(folder)]
    write_rows(folder, rows)
    with pytest.raises(ValueError, match="none of which is label"):
        read_ct_volumes(folder)
    assert len(read_ct_volumes(folder, label_column="malignant").records) == len(rows)


def test_the_datalist_holds_series_and_no_patient_id(dicom, tmp_path):
    source = read_ct_volumes(dicom)
    path = write_datalist(source, tmp_path, seed=1, test_fraction=0.3, validation_fraction=0.0)
    records = bundle_records(path, "training", base_dir=tmp_path)
    assert isinstance(records[0]["image"], list)
    loaded = LoadCTd("image")(records[0])["image"]
    assert loaded.shape[0] == 1
    ids = {record["patient_id"] for record in source.records}
    assert not ids & {record["patient_id"] for record in records}
    test = bundle_records(path, "test", base_dir=tmp_path)
    assert not {r["patient_id"] for r in records} & {r["patient_id"] for r in test}


# ------------------------------------------------------------------ findings and views


def test_a_finding_is_cut_out_where_it_is(tree):
    folder = series_folder(tree)
    (series,) = read_ct_series(folder).series
    image = LoadCT()([str(file) for file in series.files])
    voxel = np.array([10.0, 20.0, 1.0, 1.0])
    place = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(image.affine, dtype=np.float64) @ voxel
    box = CropAroundFinding((5, 5, 1))(image, place[:3].tolist())
    assert torch.equal(torch.as_tensor(box), torch.as_tensor(image)[:, 8:13, 18:23, 1:2])
    at = np.asarray(box.affine, dtype=np.float64) @ [2.0, 2.0, 0.0, 1.0]
    np.testing.assert_allclose(at, np.asarray(image.affine, dtype=np.float64) @ voxel, atol=1e-4)
    large = CropAroundFinding(200)(image)
    assert large.shape == (1, 200, 200, 200)
    assert float(large[0, 0, 0, 0]) == -1000.0
    assert float((torch.as_tensor(large) > -1000.0).sum()) == float((torch.as_tensor(image) > -1000.0).sum())
    with pytest.raises(ValueError, match="outside of the volume"):
        CropAroundFinding(4)(image, [5000.0, 0.0, 0.0])


def test_one_volume_may_hold_several_findings(tree):
    rows = rows_of(tree)
    by_folder = {series.files[0].parent.name: series for series in read_ct_series(tree).series}
    placed = []
    for row in rows:
        first = pydicom.dcmread(by_folder[Path(row["file"]).name].files[0])
        x, y, z = (float(value) for value in first.ImagePositionPatient)
        placed += [row | {"coordX": str(x + step), "coordY": str(y + step), "coordZ": str(z)} for step in (5.0, 9.0)]
    write_rows(tree, placed)
    source = read_ct_volumes(tree)
    assert len(source.records) == 2 * len(rows)
    record = CropAroundFindingd("image", 8)(LoadCTd("image")(source.records[0]))
    assert record["image"].shape == (1, 8, 8, 8)
    assert "center" not in record
    placed[0]["coordZ"] = "high"
    write_rows(tree, placed)
    with pytest.raises(ValueError, match="no place of three numbers"):
        read_ct_volumes(tree)


def test_views_of_a_record_are_random_each_and_not_cached():
    transform = Compose([RepeatViewsd(6), RandFlipd("image", prob=0.5, spatial_axis=0)])
    dataset = CacheDataset([{"image": torch.arange(8.0).reshape(1, 8)}], transform, progress=False)
    seen = {tuple(view["image"].flatten().tolist()) for _ in range(5) for view in dataset[0]}
    assert len(dataset[0]) == 6
    assert len(seen) == 2
    with pytest.raises(ValueError, match="num_views is 0"):
        RepeatViewsd(0)


def test_synthetic_volumes_for_training_are_the_same_each_time():
    one, other = SyntheticNodules(3, 16), SyntheticNodules(3, 16)
    for index in range(3):
        np.testing.assert_array_equal(one[index]["image"], other[index]["image"])
    assert one[0]["image"].shape == (1, 16, 16, 16)
    assert one[0]["label"].shape == (5,)
    with pytest.raises(IndexError):
        one[3]


def test_synthetic_nifti_says_so_unless_one_of_them_does_not(tmp_path):
    folder = write_synthetic_ct(tmp_path / "nifti", num_patients=4, file_format="nifti")
    assert read_ct_volumes(folder).synthetic
    path = next(folder.rglob("*.nii.gz"))
    image = nibabel.load(path)
    real = nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine)
    real.header["descrip"] = b"SYNTHETIC MR"
    nibabel.save(real, path)
    assert not read_ct_volumes(folder).synthetic
