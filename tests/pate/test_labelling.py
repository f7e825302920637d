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

"""Labels by vote: charged before they are drawn, drawn once, remembered, and nothing of it lost by a crash."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from monai_privacy.accounting import PrivacyBudget, PrivacyBudgetError
from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.accounting.ledger_file import LedgerError, LedgerFile
from monai_privacy.mechanisms.confident_voting import ConfidentGNMax, InteractiveGNMax
from monai_privacy.mechanisms.noise import InsecureNoise
from monai_privacy.mechanisms.voting import GNMax, LabelVoting, NoisyCount
from monai_privacy.pate.answers import AnswerFile
from monai_privacy.pate.labelling import VoteLabeller, query_digest
from monai_privacy.report import PrivacyReport

TEACHERS = 100
VOTES = torch.tensor([[95, 5], [3, 97], [52, 48], [100, 0]])
QUERIES = ["a", "b", "c", "d"]


def labeller(tmp_path, mechanism=None, *, ledger=None, budget=None, **changes):
    book = ledger or PrivacyLedger(tmp_path / "ledger.jsonl", budget=budget)
    settings = {"answers": tmp_path / "answers.jsonl", "num_teachers": TEACHERS, "max_queries": 10, "delta": 1e-5}
    return VoteLabeller(mechanism or GNMax(noise_std=10.0), book, **(settings | changes)), book


def test_an_answer_is_charged_once_and_repeated_at_no_cost(tmp_path):
    one, book = labeller(tmp_path)
    first = one.label(QUERIES, VOTES)
    assert (first.answered, first.repeated, first.labels.tolist()[:2]) == (4, 0, [0, 1])
    assert first.labels[3] == 0
    spent = book.epsilon(1e-5)
    assert book.entries[0].steps == 4
    again = one.label([*QUERIES[::-1], "e"], torch.cat([VOTES.flip(0), VOTES[:1]]))
    assert again.repeated == 4
    assert again.labels[:4].tolist() == first.labels.flip(0).tolist()
    assert book.entries[0].steps == 5
    assert book.epsilon(1e-5) > spent
    # Another process, or another day.
    other, _ = labeller(tmp_path)
    # Whatever the votes say now.
    assert other.label(QUERIES, VOTES.flip(1)).labels.tolist() == first.labels.tolist()
    assert other.queries_left == 5


def test_the_same_image_twice_in_one_call_is_one_query(tmp_path):
    one, book = labeller(tmp_path)
    found = one.label(["a", "a", "b"], VOTES[[2, 2, 1]])
    assert found.labels[0] == found.labels[1]
    assert book.entries[0].steps == 2


def test_images_are_named_by_content():
    image = torch.rand(1, 4, 4)
    assert query_digest(image) == query_digest(image.clone())
    assert query_digest(image) != query_digest(image + 1e-6)
    assert query_digest(image) != query_digest(image.reshape(1, 2, 8))
    assert query_digest(image.double()) != query_digest(image)
    assert len(query_digest(image.bfloat16())) == 32


def test_where_votes_decide_what_is_answered_all_answers_are_charged_beforehand(tmp_path):
    one, book = labeller(tmp_path, ConfidentGNMax(80, 3.0, 3.0))
    found = one.label(QUERIES, VOTES)
    assert found.labels.tolist() == [0, 1, -1, 0]
    assert (found.answered, found.abstained) == (3, 1)
    # How many were answered is private: what is claimed must not depend on it, before closing or after.
    assert [entry.steps for entry in book.entries] == [4, 10]
    claim = book.epsilon(1e-5)
    # An abstention is remembered as well: asking until it passes would be free otherwise.
    assert one.label(["c"], VOTES[:1]).labels.tolist() == [-1]
    one.close()
    assert [(entry.steps, entry.state) for entry in book.entries] == [(4, "committed"), (10, "committed")]
    assert book.epsilon(1e-5) == claim


def test_no_more_answers_than_were_charged(tmp_path):
    one, book = labeller(tmp_path, ConfidentGNMax(50, 0.1, 3.0), max_queries=3)
    found = one.label(QUERIES[:3], VOTES[[0, 1, 3]])
    assert found.answered == 3
    assert [entry.steps for entry in book.entries] == [3, 3]
    assert one.label(["x"], VOTES[:1]).unaffordable == 1
    assert [entry.steps for entry in book.entries] == [3, 3]


def test_closing_frees_them_under_an_adaptive_filter(tmp_path):
    book = PrivacyLedger.register(
        tmp_path / "ledger.jsonl", cohort="Lungs", budget=PrivacyBudget(60.0, 1e-5), adaptive=True
    )
    one, _ = labeller(tmp_path, ConfidentGNMax(75, 3.0, 6.0), ledger=book)
    one.label(QUERIES, VOTES)
    one.close()
    assert [(entry.steps, entry.state) for entry in book.entries] == [(4, "committed"), (3, "committed")]


def test_closing_frees_what_was_not_asked(tmp_path):
    one, book = labeller(tmp_path)
    one.label(QUERIES, VOTES)
    reserved = book.state.epsilon(1e-5, reserved=True)
    one.close()
    one.close()
    assert book.state.epsilon(1e-5, reserved=True) < reserved
    assert [(entry.steps, entry.state) for entry in book.entries] == [(4, "committed")]
    # Known answers stay; new ones need another file.
    found = one.label([*QUERIES, "e"], torch.cat([VOTES, VOTES[:1]]))
    assert (found.repeated, found.unaffordable, found.labels[4].item()) == (4, 1, -1)


def test_what_does_not_fit_the_budget_is_refused_whole(tmp_path):
    with pytest.raises(PrivacyBudgetError, match="budget"):
        labeller(tmp_path, GNMax(noise_std=1.0), budget=PrivacyBudget(1.0, 1e-5))
    book = PrivacyLedger(tmp_path / "ledger.jsonl")
    assert book.entries == ()
    with pytest.raises(PrivacyBudgetError):
        labeller(tmp_path, ConfidentGNMax(80, 12.0, 0.1), ledger=book)
    assert {entry.state for entry in book.entries} == {"void"}
    assert book.epsilon(1e-5) == 0


def test_answers_stop_where_the_budget_does(tmp_path):
    # Room for ten questions and a few answers; all but certainly more of the questions pass.
    one, book = labeller(tmp_path, ConfidentGNMax(50, 12.0, 8.0), budget=PrivacyBudget(2.0, 1e-5))
    granted = book.entries[1].granted
    assert 1 <= granted < 10
    names = [f"q{i}" for i in range(10)]
    found = one.label(names, VOTES[:1].expand(10, -1))
    assert found.answered == granted
    assert found.unaffordable + found.abstained == 10 - granted
    assert book.state.epsilon(1e-5, reserved=True) <= 2.0
    assert one.label(names, VOTES[:1].expand(10, -1)).labels.tolist() == found.labels.tolist()
    none = one.label(["z"], VOTES[:1])
    assert (none.unaffordable, none.labels.tolist()) == (1, [-1])


def test_an_interactive_student_may_change_and_its_costs_may_not(tmp_path):
    chances = torch.tensor([[0.9, 0.1]])
    one, book = labeller(tmp_path, InteractiveGNMax(40, 2.0, 2.0, student_probabilities=chances))
    first = one.label(["a"], VOTES[:1])
    assert first.labels.tolist() == [-1]  # as the student thinks
    other = InteractiveGNMax(40, 2.0, 2.0, student_probabilities=1 - chances)
    assert one.label(["b"], VOTES[:1], mechanism=other).labels.tolist() == [0]
    with pytest.raises(ValueError, match="other costs"):
        one.label(["c"], VOTES[:1], mechanism=GNMax(2.0))
    # The same kind, and less noise.
    wrong = InteractiveGNMax(40, 1.0, 1.0, student_probabilities=chances)
    with pytest.raises(ValueError, match="other costs"):
        one.label(["c"], VOTES[:1], mechanism=wrong)
    assert [entry.steps for entry in book.entries] == [2, 10]


def test_a_mechanism_of_the_same_cost_and_another_sensitivity_is_refused(tmp_path):
    one, _ = labeller(tmp_path, GNMax(100.0, teachers_per_patient=2))
    with pytest.raises(ValueError, match="other costs"):
        one.label(["a"], VOTES[:1], mechanism=GNMax(50.0))


def test_several_labels_for_each_query(tmp_path):
    one, _ = labeller(tmp_path, LabelVoting(2.0, num_labels=3, most_positives=2))
    votes = torch.tensor([[90, 10, 80], [0, 99, 0]])
    assert one.label(["a", "b"], votes).labels.tolist() == [[1, 0, 1], [0, 1, 0]]
    again, _ = labeller(tmp_path, LabelVoting(2.0, num_labels=3, most_positives=2))
    assert again.label(["b", "a"], votes).labels.tolist() == [[0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("queries", "votes", "message"),
    [
        (["a"], VOTES, "1 queries and votes on 4"),
        ([], VOTES[:0], "no queries"),
        (["a"], VOTES[:1] - 1, "do not add up"),
        (["a"], VOTES[:1].float() / 100, "whole numbers"),
    ],
)
def test_bad_votes_are_refused_before_anything_is_charged(tmp_path, queries, votes, message):
    one, book = labeller(tmp_path)
    with pytest.raises(ValueError, match=message):
        one.label(queries, votes)
    assert book.entries[0].steps == 0


def test_a_file_belongs_to_one_mechanism_one_set_of_teachers_and_one_ledger(tmp_path):
    labeller(tmp_path)
    for changes in ({"mechanism": GNMax(5.0)}, {"num_teachers": 50}, {"teachers": "others"}, {"max_queries": 11}):
        with pytest.raises(ValueError, match="Name another file"):
            labeller(tmp_path, **changes)
    with pytest.raises(LedgerError, match="no entry"):
        labeller(tmp_path, ledger=PrivacyLedger(tmp_path / "other.jsonl"))


def test_reopened_it_is_the_same_cohort_unit_delta_and_secrecy(tmp_path):
    book = PrivacyLedger.register(
        tmp_path / "ledger.jsonl", cohort="Lungs", budget=PrivacyBudget(8.0, 1e-5), ids=["p1", "p2"]
    )
    one, _ = labeller(tmp_path, ledger=book, ids=["p1", "p2"])
    one.label(QUERIES, VOTES)
    with pytest.raises(ValueError, match="not in the cohort"):
        labeller(tmp_path, ledger=book, ids=["p1", "stranger"])
    for changes in ({"unit": "image"}, {"delta": 1e-6}):
        with pytest.raises(ValueError, match="Name another file"):
            labeller(tmp_path, ledger=book, **changes)
    with pytest.raises(ValueError, match="noise that can be repeated"):
        labeller(tmp_path, ledger=book, noise=InsecureNoise(0))


@pytest.mark.parametrize("mechanism", [GNMax(10.0), ConfidentGNMax(80, 5.0, 5.0)])
@pytest.mark.parametrize("which", ["ledger", "answers"])
def test_an_older_copy_of_either_file_is_noticed(tmp_path, which, mechanism):
    one, _ = labeller(tmp_path, mechanism)
    one.label(QUERIES[:2], VOTES[:2])
    names = [path for path in tmp_path.iterdir() if path.name.startswith(which) and not path.name.endswith(".lock")]
    kept = {path: path.read_bytes() for path in names}
    one.label(QUERIES[2:], VOTES[2:])
    for path, content in kept.items():
        path.write_bytes(content)
    with pytest.raises(LedgerError, match="older copy"):
        labeller(tmp_path, mechanism)


def test_answers_put_back_to_before_they_were_drawn_are_not_drawn_again(tmp_path, monkeypatch):
    one, _ = labeller(tmp_path)
    kept = {}
    write = AnswerFile.write_answers

    def keeping(self, answers):
        kept.update({path: path.read_bytes() for path in tmp_path.glob("answers*") if not path.name.endswith(".lock")})
        write(self, answers)

    monkeypatch.setattr(AnswerFile, "write_answers", keeping)
    one.label(QUERIES, VOTES)
    monkeypatch.setattr(AnswerFile, "write_answers", write)
    for path, content in kept.items():
        path.write_bytes(content)
    with pytest.raises(LedgerError, match="older copy"):
        labeller(tmp_path)[0].label(QUERIES, VOTES)


def test_a_copy_of_the_answers_does_not_answer_on_the_same_charge(tmp_path):
    one, book = labeller(tmp_path)
    for path in list(tmp_path.glob("answers.jsonl*")):
        (tmp_path / path.name.replace("answers", "copy")).write_bytes(path.read_bytes())
    other, _ = labeller(tmp_path, ledger=book, answers=tmp_path / "copy.jsonl")
    other.label(QUERIES[:2], VOTES[:2])
    with pytest.raises(LedgerError, match="a second one"):
        one.label(QUERIES[:2], VOTES[:2])
    assert book.entries[0].steps == 2


def test_repeatable_noise_is_not_private(tmp_path):
    one, book = labeller(tmp_path, noise=InsecureNoise(0))
    one.label(QUERIES, VOTES)
    assert book.epsilon(1e-5) == float("inf")
    assert PrivacyReport.from_ledger(book).status == "not private"


def test_no_vote_is_on_the_disk(tmp_path):
    one, _ = labeller(tmp_path, NoisyCount(3.0))
    one.label(["mark"], torch.tensor([[37, 63]]))
    texts = [file.read_text(encoding="utf-8") for file in tmp_path.iterdir() if not file.name.endswith(".lock")]
    found = [number for text in texts for number in _numbers(text)]
    assert TEACHERS in found
    assert not {37, 63} & set(found)


def _numbers(text):
    """All numbers of a JSON-lines file but times, hashes and line numbers."""

    def walk(value):
        if isinstance(value, dict):
            for name, inner in value.items():
                if name not in ("time", "previous", "line", "sha256"):
                    yield from walk(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner)
        elif isinstance(value, (int, float)):
            yield value

    for line in text.splitlines():
        if line.startswith("{"):
            yield from walk(json.loads(line))


class StoppedError(Exception):
    pass


@contextlib.contextmanager
def interrupted(monkeypatch, stop, when):
    """Whatever writes to ledger or answers here is stopped before or after its line number ``stop``."""
    append, count = LedgerFile.append, 0

    def failing(self, record):
        nonlocal count
        count += 1
        if count == stop and when == "before":
            raise StoppedError
        append(self, record)
        if count == stop and when == "after":
            raise StoppedError

    with monkeypatch.context() as patched, contextlib.suppress(StoppedError):
        patched.setattr(LedgerFile, "append", failing)
        yield


@pytest.mark.parametrize("mechanism", [GNMax(10.0), ConfidentGNMax(80, 5.0, 5.0)])
def test_interrupted_anywhere_it_goes_on_without_a_second_charge_or_answer(tmp_path, monkeypatch, mechanism):
    for stop in range(1, 13):
        for when in ("before", "after"):
            folder = tmp_path / f"{stop}{when}"
            folder.mkdir()
            one, book = labeller(folder, mechanism)
            with interrupted(monkeypatch, stop, when):
                one.label(QUERIES, VOTES)
            # The same object goes on, on other queries first; then another process.
            one.label(["x", "a"], VOTES[[3, 0]])
            other, _ = labeller(folder, mechanism)
            found = other.label([*QUERIES, "x"], torch.cat([VOTES, VOTES[3:]]))
            assert one.label([*QUERIES, "x"], VOTES[[0, 1, 2, 3, 3]]).labels.tolist() == found.labels.tolist()
            steps = [entry.steps for entry in book.entries]
            assert steps == ([5] if isinstance(mechanism, GNMax) else [5, 10]), (stop, when)
            assert found.unaffordable == 0


@pytest.mark.parametrize("mechanism", [GNMax(10.0), ConfidentGNMax(80, 5.0, 5.0)])
def test_interrupted_while_it_is_opened_it_sets_nothing_aside_twice(tmp_path, monkeypatch, mechanism):
    runs = 1 if isinstance(mechanism, GNMax) else 2
    for stop in range(1, 4 + runs):
        for when in ("before", "after"):
            folder = tmp_path / f"{stop}{when}"
            folder.mkdir()
            _, book = labeller(folder, mechanism, answers=folder / "others.jsonl")
            with interrupted(monkeypatch, stop, when):
                labeller(folder, mechanism)
            one, _ = labeller(folder, mechanism)
            assert one.label(QUERIES, VOTES).unaffordable == 0
            reserved = [entry.granted for entry in book.entries if entry.state == "reserved"]
            assert reserved == 2 * runs * [10], (stop, when)


SCRIPT = """
import sys, torch
from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.mechanisms.confident_voting import ConfidentGNMax
from monai_privacy.pate.answers import AnswerFile
from monai_privacy.pate.labelling import VoteLabeller
folder = sys.argv[1]
one = VoteLabeller(
    ConfidentGNMax(70, 20.0, 20.0), PrivacyLedger(folder + "/ledger.jsonl"), answers=folder + "/answers.jsonl",
    num_teachers=100, max_queries=2000, delta=1e-5,
)
votes = torch.randint(0, 101, (240,), generator=torch.Generator().manual_seed(0))
votes = torch.stack([votes, 100 - votes], dim=1)
print("ready", flush=True)
for start in range(0, 240, 3):
    found = one.label([f"q{i}" for i in range(start, start + 3)], votes[start : start + 3])
    for number, label in enumerate(found.labels.tolist()):
        print(start + number, label, flush=True)
"""


@pytest.mark.slow(seconds=40)
def test_killed_at_any_point_nothing_is_charged_or_answered_twice(tmp_path):
    seen: dict[int, int] = {}
    rng = random.Random(1)
    kills, finished = 0, False
    while not finished:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        if kills < 5:
            time.sleep(rng.uniform(0.0, 0.4))
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        out, _ = process.communicate()
        lines = out.splitlines(keepends=True)
        for line in lines:
            if line.endswith("\n"):
                query, label = map(int, line.split())
                assert seen.setdefault(query, label) == label, "a second answer"
        finished = process.returncode == 0
    assert kills == 5
    assert len(seen) == 240
    book = PrivacyLedger(tmp_path / "ledger.jsonl")
    assert [entry.steps for entry in book.entries] == [240, 2000]
