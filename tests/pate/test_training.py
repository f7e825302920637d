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

"""From prepared images to labels: shards, teachers trained by a bundle, votes and labels, by function and command."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from command_line import assert_one_line, call

from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.data import read_chest_xrays, write_datalist, write_synthetic_chest_xrays
from monai_privacy.data.partition_manifest import read_manifest
from monai_privacy.pate.steps import key_from_file
from monai_privacy.pate.teachers import TeacherSet
from monai_privacy.pate.training import MANIFEST, TeacherRecipe, teacher_pool, train_teachers, write_shards

BUNDLE = Path(__file__).parents[2] / "bundles" / "chest_xray_classification"
KEY = bytes(range(32))
RECIPE = TeacherRecipe(
    BUNDLE, ("configs/train.yaml", "../overlays/pate_teacher.yaml"), overrides=(("device", "cpu"), ("epochs", 1))
)


@pytest.fixture(scope="module")
def datalist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_synthetic_chest_xrays(folder / "synthetic", num_patients=40, image_size=32, seed=3)
    return write_datalist(read_chest_xrays(folder / "synthetic"), folder / "list", seed=0)


@pytest.fixture(scope="module")
def pool():
    with teacher_pool() as processes:
        yield processes


def training(datalist):
    return json.loads(Path(datalist).read_text(encoding="utf-8"))["training"]


def test_shards_hold_each_patient_once_and_no_manifest_an_id(datalist, tmp_path):
    partition = write_shards(datalist, tmp_path, 4, key=KEY)
    patients = []
    for number in range(4):
        records = json.loads((tmp_path / f"{number:03d}" / "datalist.json").read_text(encoding="utf-8"))["training"]
        assert all(Path(record["image"]).is_file() for record in records)
        patients.append({record["patient_id"] for record in records})
    everybody = {record["patient_id"] for record in training(datalist)}
    assert set.union(*patients) == everybody
    assert sum(map(len, patients)) == len(everybody)
    manifest = (tmp_path / MANIFEST).read_text(encoding="utf-8")
    assert not any(patient in manifest for patient in everybody)
    assert read_manifest(tmp_path / MANIFEST, KEY).num_teachers == partition.num_teachers == 4


def test_records_without_patients_or_hospitals_are_refused(datalist, tmp_path):
    with pytest.raises(ValueError, match="without 'site'"):
        write_shards(datalist, tmp_path, 4, key=KEY, hospital_key="site")
    bad = tmp_path / "bad.json"
    records = [{name: value for name, value in r.items() if name != "patient_id"} for r in training(datalist)]
    bad.write_text(json.dumps({"training": records}))
    with pytest.raises(ValueError, match="not all with a patient_id"):
        write_shards(bad, tmp_path, 4, key=KEY)


@pytest.mark.slow(seconds=60)
def test_teachers_are_trained_once_resumed_and_each_on_its_own_shard(datalist, tmp_path, pool):
    shards, folder = tmp_path / "shards", tmp_path / "teachers"
    write_shards(datalist, shards, 12, key=KEY)  # some are empty
    manifest = read_manifest(shards / MANIFEST, KEY)
    steps = []
    group = train_teachers(
        RECIPE, manifest, shards, folder, pool=pool, on_done=lambda done, total: steps.append((done, total))
    )
    assert steps == [(n, 12) for n in range(13)]
    empty = [shard.teacher for shard in manifest.shards if not shard.num_rows]
    assert [teacher.number for teacher in group if teacher.checkpoint is None] == empty
    assert len({teacher.sha256 for teacher in group if teacher.checkpoint is not None}) == 12 - len(empty)

    times = {n: (folder / f"{n:03d}" / "teacher.json").stat().st_mtime_ns for n in range(12)}
    (folder / "003" / "teacher.json").unlink()
    assert train_teachers(RECIPE, manifest, shards, folder, workers=2, pool=pool).digest == group.digest
    changed = [n for n in range(12) if (folder / f"{n:03d}" / "teacher.json").stat().st_mtime_ns != times[n]]
    assert changed == [3]

    # A patient moved into another shard by hand.
    first, second = (
        (shards / f"{n:03d}" / "datalist.json") for n in [s.teacher for s in manifest.shards if s.num_rows][:2]
    )
    whole = json.loads(first.read_text())
    whole["training"] += json.loads(second.read_text())["training"]
    first.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="not those of the manifest"):
        train_teachers(RECIPE, manifest, shards, folder)
    # A training that fails says which and why.
    write_shards(datalist, shards, 12, key=KEY)
    shutil.rmtree(folder)
    broken = TeacherRecipe(BUNDLE, RECIPE.config_files, overrides=(("learning_rate", "much"),))
    with pytest.raises(ValueError, match=r"teacher \d+ could not be trained"):
        train_teachers(broken, manifest, shards, folder, workers=1, pool=pool)


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_key": "data_dir"}, "no entry 'data_dir'"),
        ({"output_key": "results"}, "no entry 'results'"),
        ({"overrides": "all patients"}, "images that are not the"),
    ],
)
def test_a_teacher_that_would_read_other_images_is_not_trained(datalist, tmp_path, pool, changes, message):
    write_shards(datalist, tmp_path / "shards", 2, key=KEY)
    manifest = read_manifest(tmp_path / "shards" / MANIFEST, KEY)
    if "overrides" in changes:
        changes = {"overrides": (*RECIPE.overrides, ("datalist_file", str(datalist)))}
    wrong = dataclasses.replace(RECIPE, **changes)
    assert wrong.digest != RECIPE.digest
    with pytest.raises(ValueError, match=message):
        train_teachers(wrong, manifest, tmp_path / "shards", tmp_path / "teachers", workers=1, pool=pool)


@pytest.mark.slow(seconds=60)
def test_the_command_line_from_prepared_images_to_labels(datalist, tmp_path):
    shards, teachers, ledger = tmp_path / "shards", tmp_path / "teachers", tmp_path / "ledger.jsonl"
    public = write_synthetic_chest_xrays(tmp_path / "public", num_patients=5, image_size=32, seed=9)
    done = call("pate", "partition", datalist, shards, "--teachers", 4, "--json")
    assert json.loads(done.stdout)["teachers"] == 4
    assert (shards / "partition.key").stat().st_mode & 0o077 == 0
    assert (shards / ".gitignore").read_text(encoding="utf-8") == "*\n"
    done = call(
        "pate", "train-teachers", BUNDLE, shards, teachers, "--config", "configs/train.yaml", "--config",
        "../overlays/pate_teacher.yaml", "--override", "epochs=1", "--override", "device=cpu", "--workers", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    votes = tmp_path / "north.json"
    asked = ["pate", "vote", BUNDLE, teachers, votes, "--hospital", "north", "--override", f"dataset_dir={public}"]
    done = call(*asked, "--override", "device=cpu")
    assert (done.returncode, "PRIVATE" in done.stdout) == (0, True), done.stderr
    labels = tmp_path / "labels.csv"
    run = ["pate", "label", votes, "--ledger", ledger, "--output", labels, "--queries", tmp_path / "north.queries.json"]
    # Four teachers are too few: refused, and nothing is charged.
    assert_one_line(call(*run, "--epsilon", 1), "a student learns little")
    assert PrivacyLedger(ledger).entries == ()
    done = call(*run, "--epsilon", 1, "--allow-uninformative", "--json")
    found = json.loads(done.stdout)
    images = len(list((public / "images").iterdir()))
    assert (found["answered"], found["repeated"]) == (images, 0)
    assert 0.99 < found["epsilon"] <= 1
    with labels.open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(Path(row["image"]).name for row in rows) == sorted(
        path.name for path in (public / "images").iterdir()
    )
    assert {row["label"] for row in rows} <= {"0", "1"}
    before = labels.read_bytes()
    assert json.loads(call(*run, "--epsilon", 1, "--allow-uninformative", "--json").stdout)["repeated"] == images
    assert labels.read_bytes() == before
    # The same hospital twice, and votes that do not add up.
    assert_one_line(call(*run[:3], votes, *run[3:], "--epsilon", 1), "north is there twice")
    text = json.loads(votes.read_text())
    counts = text["votes"][0]
    counts[counts.index(min(counts))] += 1  # a count above the number of teachers is refused in other words
    votes.write_text(json.dumps(text))
    assert_one_line(call(*run, "--epsilon", 1), "do not add up to 4 teachers")
    assert len(TeacherSet.from_folder(teachers)) == 4
    (tmp_path / "empty").mkdir()
    nobody = [*asked[:-1], f"dataset_dir={tmp_path / 'empty'}", "--override", "device=cpu"]
    assert_one_line(call(*nobody), "finds no image")


def test_bad_input_gives_one_line(datalist, tmp_path):
    missing = tmp_path / "none"
    assert_one_line(call("pate", "partition", missing, tmp_path / "s", "--teachers", 3), "none")
    assert_one_line(call("pate", "partition", datalist, tmp_path / "s", "--teachers", 0), "num_teachers is 0")
    assert_one_line(call("pate", "train-teachers", BUNDLE, missing, tmp_path / "t"), "cannot be read")
    assert_one_line(call("pate", "vote", BUNDLE, missing, tmp_path / "v", "--hospital", "n"), "no teachers")
    options = ("--ledger", tmp_path / "l", "--output", tmp_path / "o", "--epsilon", 2)
    assert_one_line(call("pate", "label", missing, *options), "cannot be read")
    (tmp_path / "key").write_text("no key")
    with pytest.raises(ValueError, match="no key in hexadecimal"):
        key_from_file(tmp_path / "key")
    bad = call("pate", "vote", BUNDLE, missing, tmp_path / "v", "--hospital", "n", "--override", "epochs")
    assert_one_line(bad, "name=value")
