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
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from monai.data import load_decathlon_datalist
from PIL import Image
from pydicom.data import get_testdata_file

from monai_privacy.data import ImageSource, count_patients, read_chest_xrays
from monai_privacy.data.datalist import write_datalist
from monai_privacy.data.image_files import image_format, read_dicom_header
from monai_privacy.data.synthetic import write_synthetic_chest_xrays

SPLITS = ("training", "validation", "test")


def refusal(call: Callable[[], object], error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------ Kermany


KERMANY = {
    "train/PNEUMONIA/person1_bacteria_1.jpeg": "person1",
    "train/PNEUMONIA/person12_virus_47.jpeg": "person12",
    "train/PNEUMONIA/BACTERIA-1135262-0004.jpeg": "1135262",
    "train/NORMAL/IM-0115-0001.jpeg": "IM-0115",
    "train/NORMAL/IM-0115-0001-0002.jpeg": "IM-0115",
    "train/NORMAL/NORMAL2-IM-0927-0001.jpeg": "NORMAL2-IM-0927",
    "val/NORMAL/NORMAL-1049278-0001.jpeg": "1049278",
    "test/PNEUMONIA/person1_virus_6.jpeg": "person1",
    "test/NORMAL/IM-0001-0001.jpeg": "IM-0001",
}


def write_kermany(root: Path) -> Path:
    for name in KERMANY:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 8), 90, np.uint8)).save(root / name)
    return root


@pytest.mark.parametrize("given", [".", ".."])
def test_kermany_as_downloaded(tmp_path: Path, given: str) -> None:
    root = write_kermany(tmp_path / "chest_xray")
    write_kermany(root / "chest_xray")  # the second copy in a re-packed archive
    junk = root / "train" / "NORMAL" / "._IM-0115-0001.jpeg"
    junk.write_bytes(b"macOS")
    (root / "train" / "NORMAL" / ".DS_Store").write_bytes(b"macOS")
    shutil.copytree(root / "train", root / "__MACOSX" / "train")
    source = read_chest_xrays(root / given)
    assert (source.layout, source.unit, source.synthetic) == ("kermany", "patient", False)
    assert source.class_names == ("normal", "pneumonia")
    found = {Path(r["image"]).resolve().relative_to(root.resolve()).as_posix(): r for r in source.records}
    assert {name: record["patient_id"] for name, record in found.items()} == KERMANY
    for name, record in found.items():
        assert record["label"] == int("PNEUMONIA" in name)
        assert record["split"] == name.split("/")[0]
    # Virus and bacteria, train and test: person1 is one patient.
    assert count_patients(source.records) == len(set(KERMANY.values())) == 7


def test_kermany_errors(tmp_path: Path) -> None:
    root = write_kermany(tmp_path / "chest_xray")
    broken = root / "val" / "NORMAL" / "IM-0009-0001.jpeg"
    broken.write_bytes(b"not a picture")
    assert f"image file {broken} cannot be read" in refusal(lambda: read_chest_xrays(root))
    broken.unlink()
    nameless = root / "val" / "NORMAL" / "scan7.jpeg"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(nameless)
    assert f"file name {nameless} tells no patient" in refusal(lambda: read_chest_xrays(root))
    nameless.unlink()
    for folder in root.glob("*/PNEUMONIA"):
        shutil.rmtree(folder)
    assert f"all 5 images of {root} have label 0" in refusal(lambda: read_chest_xrays(root))
    shutil.rmtree(root)
    (root / "train" / "NORMAL").mkdir(parents=True)
    assert f"source {root} (kermany layout) holds no images" in refusal(lambda: read_chest_xrays(root))


def test_kermanys_own_folders_do_not_split_patients(tmp_path: Path) -> None:
    # person1 lies in train and in test; the datalist must not.
    source = read_chest_xrays(write_kermany(tmp_path / "chest_xray"))
    records = [dict(r, patient_id=f"{r['patient_id']}-{copy}") for copy in range(40) for r in source.records]
    many = ImageSource("kermany", tuple(records), has_patient_ids=True)
    homes = homes_of(write_datalist(many, tmp_path / "list", seed=0))
    assert len(homes) == 7 * 40
    assert all(len(home) == 1 for home in homes.values())


# ------------------------------------------------------------------ arrays


def medmnist(n: int = 8) -> dict[str, Any]:
    arrays = {}
    for start, split in enumerate(("train", "val", "test")):
        arrays[f"{split}_images"] = np.arange(n * 30, dtype=np.uint8).reshape(n, 5, 6) + np.uint8(start)
        arrays[f"{split}_labels"] = (np.arange(n) % 2).astype(np.uint8)[:, None]
    return arrays


def arrays_with_patients(n: int = 90) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 256, (n, 5, 6), dtype=np.uint8),
        "label": (np.arange(n) % 2).astype(np.uint8),
        "patient_id": np.array([f"N{number // 3}" for number in range(n)]),
    }


def test_medmnist(tmp_path: Path) -> None:
    arrays = medmnist()
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    source = read_chest_xrays(tmp_path / "pneumoniamnist.npz")
    assert (source.layout, source.has_patient_ids, source.unit) == ("medmnist", False, "image")
    assert source.class_names == ("normal", "pneumonia")
    assert [record["patient_id"] for record in source.records] == [f"image-{index:06d}" for index in range(24)]
    assert [record["split"] for record in source.records] == ["train"] * 8 + ["val"] * 8 + ["test"] * 8
    assert [record["label"] for record in source.records] == [0, 1] * 12
    np.testing.assert_array_equal(source.records[9]["image"], arrays["val_images"][1])
    np.savez(tmp_path / "breastmnist.npz", **arrays)
    assert read_chest_xrays(tmp_path / "breastmnist.npz").class_names == ("negative", "positive")


def test_arrays_with_patients(tmp_path: Path) -> None:
    arrays = arrays_with_patients()
    np.savez(tmp_path / "ours.npz", kind=arrays["label"], **arrays)
    source = read_chest_xrays(str(tmp_path / "ours.npz"))
    assert (source.layout, source.unit, count_patients(source.records)) == ("npz", "patient", 30)
    assert [record["patient_id"] for record in source.records] == list(arrays["patient_id"])
    np.testing.assert_array_equal(source.records[7]["image"], arrays["images"][7])


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (medmnist, {"val_labels": np.full((8, 1), 2)}, "label 2 at val_labels[0] of "),
        (medmnist, {"test_labels": np.zeros((8, 14))}, "array test_labels of "),
        (medmnist, {"train_images": np.zeros((8, 5, 6, 3), np.uint8)}, "is uint8 of shape (8, 5, 6, 3), not gray"),
        (medmnist, {"train_images": np.zeros((8, 5, 6), np.float32)}, "is float32 of shape (8, 5, 6), not gray"),
        (medmnist, {"test_images": None}, "looked for train_images, train_labels"),
        (arrays_with_patients, {"label": np.full(90, np.nan)}, "label nan at label[0] of "),
        (arrays_with_patients, {"label": np.ones(89)}, "has shape (89,) for 90 images"),
        (arrays_with_patients, {"label": np.ones(90)}, "all 90 images of "),
        (arrays_with_patients, {"patient_id": np.array(["a"] * 89 + [" "])}, "patient_id[89] of "),
        (arrays_with_patients, {"patient_id": np.array(["a", "nan"] * 45)}, "patient_id[1] of "),
        (arrays_with_patients, {"patient_id": np.array(["a"])}, "has 1 rows, images has 90"),
        (arrays_with_patients, {"patient_id": np.array(["a"] * 90, object)}, "store text as numpy text arrays"),
        (arrays_with_patients, {"patient_id": None}, "has the arrays ['images', 'label'], no layout that is known"),
    ],
)
def test_array_errors(
    tmp_path: Path, base: Callable[[], dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **{key: value for key, value in {**base(), **changes}.items() if value is not None})
    told = refusal(lambda: read_chest_xrays(path))
    assert message in told
    assert str(path) in told


# ------------------------------------------------------------------ folders with a CSV


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_chest_xrays(tmp_path_factory.mktemp("made") / "x", num_patients=60, image_size=32)


@pytest.fixture
def folder(synthetic: Path, tmp_path: Path) -> Path:
    """Six DICOM files that a test may damage."""
    (tmp_path / "in" / "images").mkdir(parents=True)
    for name, _, _ in table(synthetic)[1:7]:
        shutil.copy(synthetic / name, tmp_path / "in" / name)
    save(tmp_path / "in", table(synthetic)[:7])
    return tmp_path / "in"


def table(folder: Path) -> list[list[str]]:
    with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def save(folder: Path, rows: list[list[str]], **dialect: str) -> None:
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, **dialect).writerows(rows)  # type: ignore[arg-type]


def edit(path: Path, change: Callable[[pydicom.FileDataset], object]) -> None:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)


def test_dicom_folder(synthetic: Path) -> None:
    source = read_chest_xrays(synthetic)
    assert (source.layout, source.unit, source.synthetic) == ("folder", "patient", True)
    assert source.class_names == ("normal", "pneumonia")
    assert count_patients(source.records) == 60
    expected = [(str(synthetic / name), int(label), patient_id) for name, label, patient_id in table(synthetic)[1:]]
    assert [(r["image"], r["label"], r["patient_id"]) for r in source.records] == expected
    assert "split" not in source.records[0]


def test_csv_as_people_write_it(folder: Path) -> None:
    rows = table(folder)
    os.rename(folder / rows[1][0], folder / "images" / "IM000001")  # no suffix
    (folder / "DICOMDIR").write_bytes(b"an index, no image")
    (folder / "._labels.csv").write_bytes(b"macOS")
    body = [["images/IM000001", "1.0", "x"], *([name, label, "x"] for name, label, _ in rows[2:])]
    # Semicolons, a byte order mark, capitals, a further column; patients from the DICOM headers.
    text = "\n".join(";".join(row) for row in [["Filename", " Target", "remark"], *body])
    (folder / "labels.csv").write_text(text, encoding="utf-8-sig")
    source = read_chest_xrays(folder)
    assert source.records[0]["label"] == 1
    assert [record["patient_id"] for record in source.records] == [patient_id for _, _, patient_id in rows[1:]]


def test_one_real_file_makes_the_source_real(folder: Path) -> None:
    def relabel(dataset: pydicom.FileDataset) -> None:
        dataset.ImageComments = ""  # "SYNTHETIC MR" begins the description of some real series

    edit(folder / table(folder)[3][0], relabel)
    source = read_chest_xrays(folder)
    assert not source.synthetic
    assert source.class_names == ("negative", "positive")


def test_pictures_and_nifti_with_patient_ids(folder: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "a.png")
    (folder / "b.nii.gz").write_bytes(b"read when it is loaded")
    save(folder, [["path", "label", "PatientID"], ["a.png", "0", "p1"], ["b.nii.gz", "1", " p1 "]])
    source = read_chest_xrays(folder)
    assert [record["patient_id"] for record in source.records] == ["p1", "p1"]
    assert not source.synthetic
    save(folder, [["path", "label"], ["a.png", "0"], ["b.nii.gz", "1"]])
    assert "a.png is no DICOM file that could tell the patient. Add" in refusal(lambda: read_chest_xrays(folder))


def cell(row: int, column: int, value: str) -> Callable[[list[list[str]]], None]:
    def change(rows: list[list[str]]) -> None:
        rows[row][column] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cell(0, 0, "scan"), "has the columns ['scan', 'label', 'patient_id'], none of which is file or filename or"),
        (cell(0, 1, "class"), "none of which is label or target. Rename the column that holds the label"),
        (cell(0, 2, "path"), "has the columns ['file', 'path'], and either may be the file"),
        (cell(2, 0, "images/none.dcm"), "line 3 of {csv} names the file 'images/none.dcm', which does not exist"),
        (cell(2, 0, ""), "line 3 of {csv} names the file '', which does not exist"),
        (cell(2, 0, "images"), "line 3 of {csv} names the file 'images', which does not exist"),
        (cell(2, 0, "./images/000000.dcm"), "names the file './images/000000.dcm' a second time, after line 2"),
        (cell(3, 1, "2"), "label '2' at line 4 of {csv} is neither 0 nor 1"),
        (cell(3, 1, "yes"), "label 'yes' at line 4 of {csv} is neither 0 nor 1"),
        (cell(3, 1, ""), "label '' at line 4 of {csv} is neither 0 nor 1"),
        (cell(4, 2, ""), "patient id of {folder}/images/000003.dcm on line 5 of {csv} is empty"),
        (cell(4, 2, "SECRET"), "patient id of {folder}/images/000003.dcm on line 5 of {csv} is not the one in its"),
        (lambda rows: [cell(r, 1, "1")(rows) for r in range(1, 7)], "all 6 images of {folder} have label 1"),
        (lambda rows: rows.__delitem__(slice(1, None)), "source {folder} (folder layout) holds no images"),
        (lambda rows: rows.__delitem__(slice(0, None)), "has the columns [], none of which is file"),
    ],
)
def test_csv_errors(folder: Path, change: Callable[[list[list[str]]], object], message: str) -> None:
    rows = table(folder)
    change(rows)
    save(folder, rows)
    told = refusal(lambda: read_chest_xrays(folder))
    assert message.format(csv=folder / "labels.csv", folder=folder) in told
    assert "SECRET" not in told  # a patient's id does not belong into logs
    assert "SYN0" not in told


def test_csv_in_another_encoding(folder: Path) -> None:
    (folder / "labels.csv").write_bytes("file,label\nMüller.dcm,1".encode("latin-1"))
    assert "Save it as a UTF-8 CSV file" in refusal(lambda: read_chest_xrays(folder))


def test_two_tables(folder: Path) -> None:
    shutil.copy(folder / "labels.csv", folder / "images" / "old.csv")
    assert "has 2 CSV files (images/old.csv, labels.csv)" in refusal(lambda: read_chest_xrays(folder))


def test_patient_id_missing_everywhere(folder: Path) -> None:
    rows = table(folder)
    first = folder / rows[1][0]
    edit(first, lambda dataset: setattr(dataset, "PatientID", ""))
    assert len(read_chest_xrays(folder).records) == 6  # the table knows it
    save(folder, [row[:2] for row in rows])
    assert f"PatientID of {first} is empty and CSV" in refusal(lambda: read_chest_xrays(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"hello"), "DICOM file {path} cannot be used: File is missing DICOM"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "it ends before its last pixel"),
        (lambda path: edit(path, lambda d: d.__delitem__("PixelData")), "it has no pixel data"),
        (lambda path: edit(path, lambda d: setattr(d, "NumberOfFrames", 2)), "it has 2 frames, not one picture"),
        (lambda path: edit(path, lambda d: d.__delitem__("Rows")), "no attribute 'Rows'"),
    ],
)
def test_unusable_dicom(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    path = folder / table(folder)[2][0]
    damage(path)
    told = refusal(lambda: read_chest_xrays(folder))
    assert message.format(path=path) in told
    assert str(path) in told


def test_header_check_of_other_transfer_syntaxes(monkeypatch: pytest.MonkeyPatch) -> None:
    def shipped(name: str) -> str:
        return str(get_testdata_file(name, download=False))

    for name in ("CT_small.dcm", "693_J2KI.dcm", "image_dfl.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"):
        read_dicom_header(shipped(name))  # explicit, JPEG 2000, deflated, big endian, implicit
    assert "it has no pixel data" in refusal(lambda: read_dicom_header(shipped("rtplan.dcm")))
    decoder = type("NoDecoder", (), {"is_available": False})()
    monkeypatch.setattr("monai_privacy.data.image_files.get_decoder", lambda syntax: decoder)
    assert "no installed package decodes JPEG 2000" in refusal(lambda: read_dicom_header(shipped("693_J2KI.dcm")))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.PNG", "raster"),
        ("a.jpeg", "raster"),
        ("a.nii", "nifti"),
        ("a.NII.gz", "nifti"),
        ("a.dcm", "dicom"),
        ("1.2.840.5", "dicom"),
    ],
)
def test_image_format(name: str, kind: str) -> None:
    assert image_format(Path("folder") / name) == kind


# ------------------------------------------------------------------ layouts


def test_no_such_path(tmp_path: Path) -> None:
    told = refusal(lambda: read_chest_xrays(tmp_path / "nowhere"), FileNotFoundError)
    assert f"source {tmp_path / 'nowhere'} does not exist. Check the path" in told


def test_unknown_layouts(tmp_path: Path) -> None:
    (tmp_path / "chest_xray.zip").write_bytes(b"PK")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    looked_for = "looked for {train,val,test}/{NORMAL,PNEUMONIA} folders"
    assert looked_for in refusal(lambda: read_chest_xrays(tmp_path))
    assert looked_for in refusal(lambda: read_chest_xrays(tmp_path / "chest_xray.zip"))
    assert "broken.npz cannot be read as .npz" in refusal(lambda: read_chest_xrays(tmp_path / "broken.npz"))


# ------------------------------------------------------------------ datalist


def load(path: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: load_decathlon_datalist(path, is_segmentation=False, data_list_key=name) for name in SPLITS}


def homes_of(path: Path) -> dict[str, set[str]]:
    homes: dict[str, set[str]] = {}
    for name, entries in load(path).items():
        for entry in entries:
            homes.setdefault(entry["patient_id"], set()).add(name)
    return homes


def test_datalist_of_files(synthetic: Path, tmp_path: Path) -> None:
    source = read_chest_xrays(synthetic)
    path = write_datalist(source, tmp_path / "list", seed=3)
    assert path == tmp_path / "list" / "datalist.json"
    assert [p.name for p in path.parent.iterdir()] == ["datalist.json"]
    written = json.loads(path.read_text(encoding="utf-8"))
    assert (written["synthetic"], written["unit"]) == (True, "patient")
    assert written["labels"] == {"0": "normal", "1": "pneumonia"}
    assert written["num_patients"] == {name: count_patients(written[name]) for name in SPLITS}
    assert sum(written["num_patients"].values()) == 60

    known = {record["image"]: record for record in source.records}
    pseudonyms: dict[str, set[str]] = {}
    entries = [entry for entries in load(path).values() for entry in entries]
    assert len(entries) == len(known)
    for entry in entries:
        record = known[entry["image"]]
        assert type(entry["label"]) is int
        assert entry["label"] == record["label"]
        assert re.fullmatch("[0-9a-f]{16}", entry["patient_id"])
        pseudonyms.setdefault(record["patient_id"], set()).add(entry["patient_id"])
    # One pseudonym a patient, one patient a pseudonym, one split a patient.
    assert all(len(names) == 1 for names in pseudonyms.values())
    assert len(set.union(*pseudonyms.values())) == 60
    assert all(len(home) == 1 for home in homes_of(path).values())
    assert not any(patient_id in path.read_text() for patient_id in pseudonyms)


def test_pseudonyms_cannot_be_linked_and_the_split_repeats(synthetic: Path, tmp_path: Path) -> None:
    source = read_chest_xrays(synthetic)
    first, second, other = (
        load(write_datalist(source, tmp_path / name, seed=seed)) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )

    def images(lists: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
        return {name: [entry["image"] for entry in entries] for name, entries in lists.items()}

    assert images(first) == images(second) != images(other)
    ids = [{entry["patient_id"] for entries in lists.values() for entry in entries} for lists in (first, second)]
    assert not ids[0] & ids[1]


def test_files_below_the_list_are_relative(synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(synthetic, tmp_path / "there")
    monkeypatch.chdir(tmp_path)  # the records then hold paths relative to it
    path = write_datalist(read_chest_xrays("there"), "there", seed=0)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert all(entry["image"].startswith("images/") for name in SPLITS for entry in written[name])
    elsewhere = write_datalist(read_chest_xrays("there"), "elsewhere", seed=0)
    monkeypatch.chdir("/")
    shutil.move(tmp_path / "there", tmp_path / "moved")
    assert all(Path(e["image"]).is_file() for e in load(tmp_path / "moved" / "datalist.json")["training"])
    assert load(tmp_path / elsewhere)["test"][0]["image"].startswith(str(tmp_path / "there" / "images"))


def test_datalist_of_arrays(tmp_path: Path) -> None:
    arrays = arrays_with_patients()
    np.savez(tmp_path / "x.npz", **arrays)
    path = write_datalist(read_chest_xrays(tmp_path / "x.npz"), tmp_path / "list", seed=1)
    entries = [entry for entries in load(path).values() for entry in entries]
    assert len(entries) == 90
    for entry in entries:
        assert entry["image"].startswith(str(tmp_path / "list" / "images"))
        index = int(Path(entry["image"]).stem)
        with Image.open(entry["image"]) as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), arrays["images"][index])
        assert entry["label"] == arrays["label"][index]
    assert not json.loads(path.read_text())["synthetic"]


def test_medmnist_keeps_its_splits(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **medmnist())
    path = write_datalist(read_chest_xrays(tmp_path / "x.npz"), tmp_path, seed=0, test_fraction=0.5)
    written = json.loads(path.read_text())
    assert written["unit"] == "image"
    assert written["num_patients"] == dict.fromkeys(SPLITS, 8)
    # An image's number under the name patient_id would pass a guarantee for images off as one for patients.
    assert not any("patient_id" in entry for entry in written["training"])
    assert [entry["image"] for entry in written["validation"]] == [f"images/{index:06d}.png" for index in range(8, 16)]


def test_fractions(synthetic: Path, tmp_path: Path) -> None:
    source = read_chest_xrays(synthetic)
    written = json.loads(
        write_datalist(source, tmp_path, seed=0, test_fraction=0.5, validation_fraction=0.0).read_text()
    )
    assert "validation" not in written
    assert written["num_patients"]["validation"] == 0
    assert 18 < written["num_patients"]["test"] < 42
    for test, validation in ((-0.1, 0.1), (0.1, -0.1), (0.6, 0.4), (float("nan"), 0.1)):
        write = partial(write_datalist, source, tmp_path, seed=0, test_fraction=test, validation_fraction=validation)
        told = refusal(write)
        assert f"test_fraction {test} and validation_fraction {validation} leave nobody to train on" in told


def test_a_split_without_both_classes(folder: Path, tmp_path: Path) -> None:
    source = read_chest_xrays(folder)
    few = count_patients(source.records)
    told = refusal(lambda: write_datalist(source, tmp_path / "list", seed=0, test_fraction=0.01))
    assert re.search(rf"split \w+ has \d+ images of [01] classes.*Add patients to the {few} there are", told)
    assert not (tmp_path / "list").exists()
