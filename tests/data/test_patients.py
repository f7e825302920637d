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
"""Patients of records that carry no id."""

from __future__ import annotations

import pytest

from monai_privacy.data import with_patient_ids

RECORDS = [{"image": "data/a/p01_1.png", "label": 0}, {"image": ["data/b/p02_1.png", "data/b/p02_2.png"], "label": 1}]


def test_a_pattern_tells_the_patient():
    assert [record["patient_id"] for record in with_patient_ids(RECORDS, pattern=r"p(\d+)_")] == ["01", "02"]
    named = with_patient_ids(RECORDS, pattern=r"/(a|b)/p(?P<patient>\d+)", patient_key="who")
    assert [record["who"] for record in named] == ["01", "02"]
    assert "patient_id" not in RECORDS[0]


def test_a_table_tells_the_patient_by_the_end_of_the_path(tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text("file,patient_id\np01_1.png,A\nb/p02_1.png,B\np02_2.png,B\n", encoding="utf-8")
    assert [record["patient_id"] for record in with_patient_ids(RECORDS, table=table)] == ["A", "B"]
    both = [{"image": "a/1.png"}, {"image": "b/1.png"}]
    table.write_text("file,patient_id\na/1.png,A\n1.png,B\n", encoding="utf-8")
    assert [record["patient_id"] for record in with_patient_ids(both, table=table)] == ["A", "B"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "exactly one of"),
        ({"pattern": "x", "table": "y"}, "exactly one of"),
        ({"pattern": "p("}, "no regular expression"),
        ({"pattern": r"p\d+"}, "no group"),
        ({"pattern": r"q(\d+)"}, "record 0 does not match"),
        ({"pattern": r"p(\d+)", "image_key": "scan"}, "no file name under 'scan'"),
        ({"pattern": r"p(\d+)", "patient_key": "label"}, "has label already"),
        ({"pattern": r"(\d)\.png"}, "belong to 2 patients"),
    ],
)
def test_what_tells_no_patient_is_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        with_patient_ids(RECORDS, **arguments)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,patient_id\np01_1.png,A\n", "record 1 is not in"),
        ("file,patient_id\np01_1.png,\n", "line 2 of"),
        ("name,patient_id\np01_1.png,A\n", "lacks file or patient_id"),
        ("file,patient_id\np01_1.png,A\np01_1.png,B\n", "another patient"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path, text, reason):
    table = tmp_path / "patients.csv"
    table.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        with_patient_ids(RECORDS, table=table)
