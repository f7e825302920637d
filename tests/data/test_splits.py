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

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_privacy.data.splits import split_patients

FRACTIONS = {"training": 0.7, "validation": 0.1, "test": 0.2}
GOLDEN = {"training": (0, 1, 2, 3, 5, 6, 7, 9, 11), "validation": (4, 10), "test": (8,)}
IDS = st.lists(st.text(alphabet="ABC0123", min_size=1, max_size=3), max_size=40)
SEEDS = st.integers(min_value=-(2**40), max_value=2**40)


def by_patient(patient_ids: list[str], split: dict[str, tuple[int, ...]]) -> dict[str, str]:
    return {patient_ids[row]: name for name, rows in split.items() for row in rows}


@given(IDS, SEEDS)
def test_every_row_is_placed_once_and_no_patient_is_divided(patient_ids: list[str], seed: int) -> None:
    split = split_patients(patient_ids, FRACTIONS, seed=seed)
    assert list(split) == list(FRACTIONS)
    assert sorted(row for rows in split.values() for row in rows) == list(range(len(patient_ids)))
    assert all(list(rows) == sorted(rows) for rows in split.values())
    homes = [{patient_ids[row] for row in rows} for rows in split.values()]
    assert sum(len(home) for home in homes) == len(set(patient_ids))


@given(IDS, st.text(alphabet="XYZ", min_size=1), SEEDS, st.data())
def test_adding_a_patient_moves_nobody_else(patient_ids: list[str], newcomer: str, seed: int, data: st.DataObject):
    before = by_patient(patient_ids, split_patients(patient_ids, FRACTIONS, seed=seed))
    more = data.draw(st.permutations([*patient_ids, newcomer]))
    after = by_patient(more, split_patients(more, FRACTIONS, seed=seed))
    after.pop(newcomer)
    assert after == before


def test_ids_that_only_resemble_each_other_are_two_patients() -> None:
    ids = ["7", "70", "7.01", "7.10", "07", "7-0", "P7", "P.0", "P"]
    assert split_patients(ids, {"training": 1.0}, seed=0)["training"] == tuple(range(len(ids)))


def test_the_seed_decides_and_expected_sizes_are_met() -> None:
    patient_ids = [f"P{number}" for number in range(4000)]
    first = split_patients(patient_ids, FRACTIONS, seed=1)
    assert first == split_patients(patient_ids, FRACTIONS, seed=1)
    assert first != split_patients(patient_ids, FRACTIONS, seed=2)
    for name, fraction in FRACTIONS.items():
        # Five standard deviations of a binomial count.
        slack = 5 * (4000 * fraction * (1 - fraction)) ** 0.5
        assert abs(len(first[name]) - 4000 * fraction) < slack


def test_the_placement_is_the_same_on_every_machine_and_release() -> None:
    # A golden value: were the hash to change, patients whom a model was tested on could move into its training set.
    split = split_patients([f"P{number}" for number in range(12)], FRACTIONS, seed=0)
    assert split == GOLDEN


def test_a_split_of_fraction_zero_is_empty() -> None:
    split = split_patients(["a", "b", "c"], {"training": 1.0, "test": 0.0}, seed=0)
    assert split == {"training": (0, 1, 2), "test": ()}


def test_rounding_leaves_nobody_out() -> None:
    tenths = {str(number): 0.1 for number in range(10)}  # sums to 0.9999999999999999
    assert sum(len(rows) for rows in split_patients([str(n) for n in range(500)], tenths, seed=3).values()) == 500


@pytest.mark.parametrize(
    ("patient_ids", "fractions", "message"),
    [
        (["a"], {"training": 0.5, "test": 0.6}, "fractions sum to 1.1, not 1"),
        (["a"], {}, "fractions sum to 0, not 1"),
        (["a"], {"training": 1.2, "test": -0.2}, "fraction of split 'training' is 1.2"),
        (["a"], {"training": float("nan")}, "fraction of split 'training' is nan"),
        ("abc", {"training": 1.0}, "patient_ids is one text of 3 letters"),
        (["a", 7], {"training": 1.0}, "patient_ids[1] is a int"),
        (["a", " "], {"training": 1.0}, "patient_ids[1] is empty"),
        (["7", "8", "7.0"], {"training": 1.0}, "the patient ids of rows 0 and 2 differ in blanks"),
        (["b", "P1", "P1", " p1"], {"training": 1.0}, "the patient ids of rows 1 and 3 differ in blanks"),
    ],
)
def test_errors(patient_ids: list[str], fractions: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        split_patients(patient_ids, fractions, seed=0)
    assert "\n" not in str(error.value)
