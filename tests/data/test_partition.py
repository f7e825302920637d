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

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_privacy.data import (
    PartitionManifest,
    PatientPartition,
    new_partition_key,
    partition_patients,
    read_manifest,
    write_manifest,
)
from monai_privacy.data.partition_manifest import TeacherShard, _content, _signature, derived_key

KEY = bytes(range(32))
GOLDEN = ((0, 4, 6), (1, 2, 3), (5, 7))
GOLDEN_TWO = ((1, 2, 4), (0, 2, 3, 4, 5, 6, 7), (0, 1, 3, 5, 6, 7))
IDS = st.lists(st.text(alphabet="ABC0123", min_size=1, max_size=3), max_size=30)
KEYS = st.binary(min_size=16, max_size=40)


def shards(patient_ids: list[str], partition: PatientPartition) -> list[Counter[str]]:
    """What each teacher learns from: patients, each as often as it has rows there."""
    return [Counter(patient_ids[row] for row in rows) for rows in partition.rows]


@given(IDS, KEYS, st.integers(1, 12), st.integers(1, 12), st.randoms())
def test_one_patient_more_changes_the_rows_of_as_many_teachers_as_declared(patient_ids, key, num_teachers, t, random):
    t = min(t, num_teachers)
    more = [*patient_ids, "newcomer", "newcomer"]
    random.shuffle(more)
    before = shards(patient_ids, partition_patients(patient_ids, num_teachers, key=key, teachers_per_patient=t))
    after = shards(more, partition_patients(more, num_teachers, key=key, teachers_per_patient=t))
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == t
    assert all(new - old == Counter(newcomer=2) and not old - new for old, new in changed)


@given(IDS, KEYS, st.integers(1, 12), st.integers(1, 12))
def test_all_rows_of_a_patient_are_with_the_same_teachers(patient_ids, key, num_teachers, t):
    t = min(t, num_teachers)
    partition = partition_patients(patient_ids, num_teachers, key=key, teachers_per_patient=t)
    assert partition.num_teachers == len(partition.rows) == num_teachers
    assert all(list(rows) == sorted(set(rows)) for rows in partition.rows)
    rows_of = Counter(patient_ids)
    homes = Counter()
    for shard in shards(patient_ids, partition):
        assert all(rows == rows_of[patient] for patient, rows in shard.items())
        homes.update(shard.keys())
    assert homes == Counter(dict.fromkeys(rows_of, t))


def test_the_key_decides_and_teachers_are_equally_likely():
    patient_ids = [f"P{number}" for number in range(6000)]
    first = partition_patients(patient_ids, 7, key=KEY)
    assert first == partition_patients(patient_ids, 7, key=KEY)
    assert first.rows != partition_patients(patient_ids, 7, key=KEY[:-1] + b"x").rows
    for partition in (first, partition_patients(patient_ids, 7, key=KEY, teachers_per_patient=3)):
        expected = 6000 * partition.teachers_per_patient / 7
        # Five standard deviations of a binomial count.
        assert all(abs(len(rows) - expected) < 5 * (expected * (1 - expected / 6000)) ** 0.5 for rows in partition.rows)


def test_the_placement_is_the_same_on_every_machine_and_release():
    # Golden values: were the hash to change, a patient whose vote is spent would move to another teacher.
    patient_ids = [f"P{number}" for number in range(8)]
    assert partition_patients(patient_ids, 3, key=KEY).rows == GOLDEN
    assert partition_patients(patient_ids, 3, key=KEY, teachers_per_patient=2).rows == GOLDEN_TWO


@given(st.lists(st.tuples(st.sampled_from("ABCDEF"), st.sampled_from(["north", "south"])), min_size=1), KEYS)
def test_hospitals_have_teachers_of_their_own(rows, key):
    patient_ids, hospitals = [patient for patient, _ in rows], [hospital for _, hospital in rows]
    partition = partition_patients(patient_ids, 3, key=key, teachers_per_patient=2, hospitals=hospitals)
    assert partition.hospitals == tuple(sorted(set(hospitals)))
    assert partition.num_teachers == 3 * len(set(hospitals))
    for index, name in enumerate(partition.hospitals):
        own = [row for row, hospital in enumerate(hospitals) if hospital == name]
        alone = partition_patients([patient_ids[row] for row in own], 3, key=key)
        teachers = partition.teachers_of_hospitals[name]
        assert teachers == tuple(range(3 * index, 3 * index + 3))
        assert [partition.rows[teacher] for teacher in teachers] == [
            tuple(own[row] for row in rows) for rows in alone.rows
        ]


def test_a_patient_at_more_hospitals_than_declared_is_refused_without_being_named():
    arguments = {"patient_ids": ["Ann", "Bob", "Ann", "Ann", "Bob"], "num_teachers": 2, "key": KEY}
    hospitals = ["a", "a", "b", "c", "a"]
    with pytest.raises(
        ValueError, match=r"1 patients occur at more hospitals than teachers_per_patient 2.* at 3"
    ) as error:
        partition_patients(**arguments, teachers_per_patient=2, hospitals=hospitals)
    assert "Ann" not in str(error.value)
    partition = partition_patients(**arguments, teachers_per_patient=3, hospitals=hospitals)
    assert sorted(row for rows in partition.rows for row in rows) == [0, 1, 2, 3, 4]


def test_empty_teachers_are_said():
    partition = partition_patients(["P1", "P1"], 4, key=KEY)
    (home,) = (teacher for teacher, rows in enumerate(partition.rows) if rows)
    assert partition.empty_teachers == tuple(teacher for teacher in range(4) if teacher != home)
    assert partition.manifest()["teachers"][home]["patients"] == 1
    assert partition_patients([], 4, key=KEY).empty_teachers == (0, 1, 2, 3)


def test_the_manifest_counts_and_names_nobody(tmp_path):
    patient_ids = [*(f"{name} Example" for name in ("Ann", "Bob", "Cem", "Ann", "Dora", "Emil", "Fay")), "Gus Example"]
    partition = partition_patients(patient_ids, 2, key=KEY, hospitals=["east"] * 7 + ["west"])
    written = write_manifest(partition, tmp_path / "manifest.json")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    text = written.read_text(encoding="utf-8")
    assert json.loads(text) == partition.manifest()
    assert "Example" not in text + repr(partition)
    for secret in (KEY, partition.signed.digest_key):
        assert secret.hex() not in text
        assert repr(secret)[2:-1] not in repr(partition) + repr(partition.signed)
    data = partition.manifest()
    assert (data["version"], data["num_teachers"], data["teachers_per_patient"]) == (1, 4, 1)
    assert data["hospitals"] == ["east", "west"]
    assert all(entry["digests"] == sorted(entry["digests"]) for entry in data["teachers"])
    assert [entry["rows"] for entry in data["teachers"]] == [len(rows) for rows in partition.rows]
    assert [entry["patients"] for entry in data["teachers"]] == [
        len({patient_ids[row] for row in rows}) for rows in partition.rows
    ]
    assert read_manifest(written, KEY) == partition.signed


def test_an_interrupted_write_leaves_the_old_manifest(tmp_path, monkeypatch):
    path = write_manifest(partition_patients(["P1"], 2, key=KEY), tmp_path / "m.json")
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(partition_patients(["P1", "P2"], 2, key=KEY), path)
    assert path.read_bytes() == before


def test_digests_tell_nothing_without_the_key_and_are_not_those_of_the_placement(tmp_path):
    def digests(key: bytes) -> set[str]:
        data = partition_patients(["P1", "P2"], 2, key=key).manifest()
        return {digest for entry in data["teachers"] for digest in entry["digests"]}

    assert len(digests(KEY)) == 2
    assert not digests(KEY) & digests(KEY[::-1])
    assert len({derived_key(KEY, purpose) for purpose in ("placement", "digests", "signature")} | {KEY}) == 4


def test_strangers_pass_and_patients_of_teachers_are_counted(tmp_path):
    path = write_manifest(partition_patients(["Ann", "Bob", "Cem"], 5, key=KEY), tmp_path / "manifest.json")
    manifest = read_manifest(path, KEY)
    manifest.require_strangers(["Dora", "Dora", "Emil"])
    manifest.require_strangers([])
    with pytest.raises(ValueError, match="2 of 3 patients are among those") as error:
        manifest.require_strangers(["Bob", "Dora", "Ann", "Bob"])
    assert not re.search("Ann|Bob|Dora", str(error.value))
    with pytest.raises(ValueError, match=re.escape("patient_ids[1] is empty")):
        manifest.require_strangers(["Dora", ""])


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["teachers"][0].update(rows=7),
        lambda data: data["teachers"][0]["digests"].pop(),
        lambda data: data.update(teachers_per_patient=2),
        lambda data: data.update(num_teachers=3),
        lambda data: data["teachers"].reverse(),
        lambda data: data.update(signature="0" * 64),
        lambda data: data.update(signature=None),
        lambda data: data.pop("signature"),
        lambda data: data.update(remark="more"),
    ],
)
def test_a_changed_manifest_is_noticed(tmp_path, change):
    path = write_manifest(partition_patients([f"P{number}" for number in range(9)], 2, key=KEY), tmp_path / "m.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="does not carry the signature of this key"):
        read_manifest(path, KEY)


def test_another_key_and_another_layout(tmp_path):
    path = write_manifest(partition_patients(["P1"], 2, key=KEY), tmp_path / "m.json")
    with pytest.raises(ValueError, match="does not carry the signature of this key"):
        read_manifest(path, new_partition_key())
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(dict(reversed(data.items())), indent=8), encoding="utf-8")
    assert read_manifest(path, KEY).num_teachers == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no manifest of a partition"),
        ('{"format": "else"}', "is no manifest of a partition"),
        ('{"format": "monai_privacy partition of patients", "version": 2}', "has version 2, but this release reads"),
        ('{"format": "monai_privacy partition of patients"}', "has version None"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "m.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "m.json", KEY)


def shard(teacher: int, digests: tuple[str, ...] = (), **numbers: int) -> TeacherShard:
    return TeacherShard(teacher, numbers.get("rows", len(digests)), numbers.get("patients", len(digests)), digests)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((2, 1, (), (shard(0, ("a", "b")), shard(1, ("b",)))), "1 patients are with up to 2 teachers"),
        ((3, 2, (), tuple(shard(number, ("a",)) for number in range(3))), "1 patients are with up to 3 teachers"),
        ((2, 1, (), (shard(0, ("a",)), shard(0, ("b",)))), "it lists teachers 0, 0 where 2 teachers"),
        ((3, 1, (), (shard(0, ("a",)), shard(1, ("b",)))), "it lists teachers 0, 1 where 3 teachers"),
        (
            (3, 1, ("x", "y"), tuple(shard(number) for number in range(3))),
            "2 hospitals cannot have the same share of 3",
        ),
        ((1, 1, (), (shard(0, ("a",), patients=2),)), "teacher 0 has 2 patients but 1 digests"),
        ((1, 1, (), (shard(0, ("a", "a")),)), "teacher 0 has a patient twice"),
        ((1, 1, (), (shard(0, ("a", "b"), rows=1),)), "teacher 0 has 2 patients with 1 rows"),
        ((1, 1, (), (shard(0, rows=4),)), "teacher 0 has 0 patients with 4 rows"),
        ((1, 1, (), (TeacherShard("0", 0, 0, ()),)), "it lists teachers 0 where"),
        (("1", 1, (), (shard(0),)), "an entry is missing or of another type"),
    ],
)
def test_a_contradiction_is_refused_even_if_signed(tmp_path, content, message):
    data = _content(*content)
    data["signature"] = _signature(data, KEY)
    (tmp_path / "m.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_manifest(tmp_path / "m.json", KEY)
    assert "\n" not in str(error.value)


def test_a_patient_may_be_with_as_many_teachers_as_declared():
    manifest = PartitionManifest(2, 2, (), (shard(0, ("a",)), shard(1, ("a",))), "", KEY)
    manifest.require_whole()


def test_keys_are_new_each_time():
    assert len({new_partition_key() for _ in range(10)}) == 10
    assert len(new_partition_key()) == 32


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": b"short"}, "key has 5 bytes, fewer than 16"),
        ({"key": "0123456789abcdef0123456789abcdef"}, "key is a str, not bytes"),
        ({"num_teachers": 0}, "num_teachers is 0"),
        ({"teachers_per_patient": 0}, "teachers_per_patient is 0"),
        ({"teachers_per_patient": 4}, "teachers_per_patient is 4, above num_teachers 3"),
        ({"patient_ids": "abc"}, "patient_ids is one text of 3 letters"),
        ({"patient_ids": ["a", 7]}, "patient_ids[1] is a int"),
        ({"patient_ids": ["a", " "]}, "patient_ids[1] is empty"),
        ({"hospitals": ["x"]}, "hospitals has 1 entries for 2 rows"),
        ({"hospitals": "xy"}, "hospitals is one text of 2 letters"),
        ({"hospitals": ["x", None]}, "hospitals[1] is None, which is no name"),
        ({"hospitals": ["x", " "]}, "hospitals[1] is ' ', which is no name"),
        ({"hospitals": [], "patient_ids": []}, "hospitals is empty"),
    ],
)
def test_errors(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        partition_patients(**{"patient_ids": ["a", "b"], "num_teachers": 3, "key": KEY} | changed)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_short_key_reads_no_manifest_either(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key has 3 bytes"):
        read_manifest(tmp_path / "none.json", b"abc")
