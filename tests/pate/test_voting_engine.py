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

"""Teachers vote one at a time, on the same images, as themselves; and votes from ensembles and hospitals."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import weakref

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import EnsembleEvaluator
from monai.engines.utils import IterationEvents
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, RandFlipd, ScaleIntensityd
from torch import nn

from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.mechanisms.voting import GNMax, LabelVoting, limit_positives
from monai_privacy.pate.components import PrivateVoted, PrivateVoteHandler
from monai_privacy.pate.engine import TeacherVoteEvaluator, VoteEvents, most_likely_class
from monai_privacy.pate.hospital_votes import HospitalVotes, read_hospital_votes, total_votes, write_hospital_votes
from monai_privacy.pate.labelling import VoteLabeller, query_digest
from monai_privacy.pate.steps import label_votes
from monai_privacy.pate.teachers import Teacher, TeacherSet, record_teacher, trained_teacher, weights_digest
from monai_privacy.provenance import file_digest

QUERIES = 6


class Net(nn.Module):
    """A teacher that is sure of one class, whatever the image, unless in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(2))
        self.drop = nn.Dropout(0.999)

    def forward(self, x):
        return self.drop(torch.ones(len(x), 1)) * (self.scores + 0 * x.flatten(1).sum(1, keepdim=True))


def images(transform=None, count=QUERIES):
    generator = torch.Generator().manual_seed(0)
    return Dataset([{"image": torch.rand(1, 8, 8, generator=generator)} for _ in range(count)], transform)


def loader(**changes):
    return DataLoader(changes.pop("dataset", images()), **({"batch_size": 4, "num_workers": 0} | changes))


def teachers(folder, classes, *, shift=0.0):
    found = []
    for number, chosen in enumerate(classes):
        own = folder / f"{number:03d}"
        own.mkdir(parents=True)
        state = {"scores": torch.tensor([1.0 - chosen, float(chosen)]) * (2 + number) + shift}
        torch.save({"model": state}, own / "model.pt")
        teacher = Teacher(number, own / "model.pt", file_digest(own / "model.pt"), f"shard {number}")
        record_teacher(own, teacher)
        found.append(teacher)
    return TeacherSet(tuple(found))


def evaluator(group, **changes):
    settings = {"device": "cpu", "val_data_loader": loader(), "network": Net(), "teachers": group}
    return TeacherVoteEvaluator(**(settings | changes))


def labeller(tmp_path, num_teachers, mechanism=None, **changes):
    settings = {"answers": tmp_path / "answers.jsonl", "num_teachers": num_teachers, "max_queries": 50, "delta": 1e-5}
    return VoteLabeller(mechanism or GNMax(0.1), PrivacyLedger(tmp_path / "ledger.jsonl"), **(settings | changes))


def test_every_teacher_votes_on_every_image_in_evaluation_mode(tmp_path):
    one = evaluator(teachers(tmp_path / "t", [0, 1, 1, 1, 0]))
    one.run()
    assert one.votes().tolist() == [[2, 3]] * QUERIES
    assert one.queries == tuple(query_digest(item["image"]) for item in images())
    one.run()
    assert one.votes().tolist() == [[2, 3]] * QUERIES


def test_labels_leave_and_votes_do_not(tmp_path):
    group = teachers(tmp_path / "t", [1] * 9 + [0])
    outputs, fired = [], []
    one = evaluator(group, labeller=labeller(tmp_path, 10))
    for event in VoteEvents:
        one.add_event_handler(event, lambda _, event=event: fired.append(event))
    one.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    one.run()
    assert one.state.labels.labels.tolist() == [1] * QUERIES
    assert fired == [VoteEvents.ANSWERED]
    assert outputs == [{}] * 20
    with pytest.raises(RuntimeError, match="no votes"):
        one.votes()
    steps = PrivacyLedger(tmp_path / "ledger.jsonl").entries[0].steps
    again = evaluator(group, labeller=labeller(tmp_path, 10))
    again.run()
    assert again.state.labels.repeated == QUERIES
    assert PrivacyLedger(tmp_path / "ledger.jsonl").entries[0].steps == steps == QUERIES


def test_what_did_not_fit_the_budget_is_said(tmp_path):
    fired = []
    one = evaluator(teachers(tmp_path / "t", [1, 1]), labeller=labeller(tmp_path, 2, max_queries=4))
    one.add_event_handler(VoteEvents.BUDGET_EXHAUSTED, lambda: fired.append("exhausted"))
    one.run()
    assert fired == ["exhausted"]
    assert (one.state.labels.answered, one.state.labels.unaffordable) == (4, 2)


def test_one_teacher_at_a_time_is_in_memory(tmp_path, monkeypatch):
    alive = weakref.WeakSet()
    load = torch.load

    def watched(*args, **kwargs):
        gc.collect()
        assert len(alive) <= 1
        state = load(*args, **kwargs)
        alive.add(state["model"]["scores"])
        return state

    monkeypatch.setattr(torch, "load", watched)
    evaluator(teachers(tmp_path / "t", [0, 1, 1, 1])).run()


def test_a_teacher_of_an_empty_shard_votes_for_a_fixed_class(tmp_path):
    group = teachers(tmp_path / "t", [1, 1])
    group = TeacherSet((*group.teachers, Teacher(2, None, "", "empty"), Teacher(3, None, "", "empty")))
    one = evaluator(group)
    one.run()
    assert one.votes().tolist() == [[1, 3]] * QUERIES


def test_sliding_windows_and_other_inferers_work(tmp_path):
    class Dense(Net):
        def forward(self, x):
            return super().forward(x)[:, :, None, None].repeat(1, 1, *x.shape[2:])

    def by_mean(prediction, classes):
        return most_likely_class(prediction.mean((2, 3)), classes)

    inferer = SlidingWindowInferer(roi_size=(4, 4), sw_batch_size=2)
    one = evaluator(teachers(tmp_path / "t", [0, 1, 1]), network=Dense(), inferer=inferer, vote=by_mean)
    one.run()
    assert one.votes().tolist() == [[1, 2]] * QUERIES


def test_several_labels(tmp_path):
    class Findings(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return torch.stack([self.scores[1], self.scores[0], -self.scores.sum()])[None].expand(len(x), -1)

    # 2 votes, 1 and 0, against 1.5 of 3: more than 10 standard deviations from the other answer.
    mechanism = LabelVoting(0.04, num_labels=3, most_positives=1)
    one = evaluator(
        teachers(tmp_path / "t", [1, 1, 0]), network=Findings(), num_classes=3,
        vote=lambda scores, classes: limit_positives(scores.sigmoid(), 0.5, 1),
        labeller=labeller(tmp_path, 3, mechanism),
    )  # fmt: skip
    one.run()
    assert one.state.labels.labels.tolist() == [[1, 0, 0]] * QUERIES


@pytest.mark.parametrize("changes", [{"shuffle": True}, {"dataset": images(RandFlipd("image", prob=0.5))}])
def test_a_loader_that_is_not_the_same_for_all_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match="every teacher must see the same"):
        evaluator(teachers(tmp_path / "t", [1]), val_data_loader=loader(**changes))


def test_a_random_transform_in_disguise_is_noticed_and_nothing_charged(tmp_path):
    def noisy(item):
        return {"image": item["image"] + torch.rand(1)}

    dataset = images(Compose([ScaleIntensityd("image"), noisy]))
    with pytest.raises(ValueError, match="saw other images"):
        evaluator(
            teachers(tmp_path / "t", [1, 1]), val_data_loader=loader(dataset=dataset), labeller=labeller(tmp_path, 2)
        ).run()
    assert PrivacyLedger(tmp_path / "ledger.jsonl").entries[0].steps == 0


def test_scores_that_are_not_finite_stop_before_any_charge(tmp_path):
    group = teachers(tmp_path / "t", [1], shift=math.nan)
    with pytest.raises(ValueError, match="teacher 0 gives scores that are not finite"):
        evaluator(group, labeller=labeller(tmp_path, 1)).run()
    assert PrivacyLedger(tmp_path / "ledger.jsonl").entries[0].steps == 0


def test_a_network_with_one_score_or_too_many():
    assert most_likely_class(torch.tensor([[0.3], [-2.0]]), 2).tolist() == [[0, 1], [1, 0]]
    assert most_likely_class(torch.tensor([[1.0, 3.0, 2.0]]), 3).tolist() == [[0, 1, 0]]
    with pytest.raises(ValueError, match="3 scores an image, but there are 2 classes"):
        most_likely_class(torch.zeros(1, 3), 2)


# --- teachers on the disk


def test_a_set_is_read_back_from_its_folder(tmp_path):
    group = teachers(tmp_path, [0, 1, 1])
    assert TeacherSet.from_folder(tmp_path, num_teachers=3) == group
    assert len(group.digest) == 64
    with pytest.raises(ValueError, match="3 teachers, but the manifest has 4"):
        TeacherSet.from_folder(tmp_path, num_teachers=4)


def test_a_set_is_of_as_many_different_teachers(tmp_path):
    first, second, third = teachers(tmp_path, [0, 1, 1]).teachers
    copy = dataclasses.replace
    for group, message in [
        ((), "no teachers"),
        ((first, third), "1 missing and none twice"),
        ((first, first, second), "2 missing and 0 twice"),
        ((first, copy(second, sha256=first.sha256), third), "teachers 0, 1 have the same weights"),
        ((first, copy(second, shard=third.shard), third), "teachers 1, 2 have the same shard"),
        ((first, copy(second, recipe="other"), third), "different configs"),
    ]:
        with pytest.raises(ValueError, match=message):
            TeacherSet(group)


def test_patients_in_several_teachers_cost_more_or_are_refused(tmp_path):
    group = TeacherSet(
        tuple(dataclasses.replace(one, teachers_per_patient=2) for one in teachers(tmp_path / "t", [0, 1, 1]).teachers)
    )
    assert group.teachers_per_patient == 2
    with pytest.raises(ValueError, match="patients are in 2 of these teachers"):
        evaluator(group, labeller=labeller(tmp_path, 3))
    enough = labeller(tmp_path, 3, GNMax(0.3, teachers_per_patient=2), answers=tmp_path / "other.jsonl")
    evaluator(group, labeller=enough).run()
    votes = dataclasses.replace(votes_of("north", [[5, 0], [1, 4]]), teachers_per_patient=2)
    book = PrivacyLedger(tmp_path / "book.jsonl")
    common = {"epsilon": 1.0, "delta": 1e-5, "allow_uninformative": True}
    with pytest.raises(ValueError, match="patients in 2 of its teachers"):
        label_votes([votes], book, tmp_path / "answers2.jsonl", **common)
    assert book.entries == ()
    label_votes([votes], book, tmp_path / "answers2.jsonl", teachers_per_patient=2, **common)
    assert 0.99 < book.epsilon(1e-5) <= 1


def test_teachers_of_two_partitions_or_half_of_one_do_not_vote_together(tmp_path):
    one, two = teachers(tmp_path, [0, 1]).teachers
    replace = dataclasses.replace
    whole = [replace(teacher, partition="p", of=2) for teacher in (one, two)]
    assert len(TeacherSet(tuple(whole))) == 2
    for group in ([whole[0], replace(whole[1], partition="q")], [replace(whole[0], of=3), replace(whole[1], of=3)]):
        with pytest.raises(ValueError, match="not all those of one partition"):
            TeacherSet(tuple(group))


def test_the_same_weights_in_two_files_are_one_teacher(tmp_path):
    state = {"model": {"scores": torch.tensor([1.0, 2.0])}}
    for name in ("best.pt", "last.pt"):
        torch.save(state, tmp_path / name)
    paths = [tmp_path / "best.pt", tmp_path / "last.pt"]
    assert file_digest(paths[0]) != file_digest(paths[1])
    with pytest.raises(ValueError, match="teachers 0, 1 have the same weights"):
        TeacherSet.from_checkpoints(paths)


def test_shards_known_to_be_different_may_teach_the_same(tmp_path):
    state = {"model": {"scores": torch.tensor([1.0, 2.0])}}
    for number in range(2):
        torch.save(state, tmp_path / f"{number}.pt")
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    known = [
        Teacher(n, path, file_digest(path), f"shard {n}", weights=weights_digest(path), partition="p", of=2)
        for n, path in enumerate(paths)
    ]
    assert len({teacher.identity for teacher in TeacherSet(tuple(known))}) == 2
    # The same shard trained again is the same patients.
    assert known[0].identity == dataclasses.replace(known[0], sha256="other", weights="other").identity
    with pytest.raises(ValueError, match="the same shard"):
        TeacherSet((known[0], dataclasses.replace(known[1], shard="shard 0")))


def test_one_teacher_cannot_say_more_than_it_is_charged_for(tmp_path):
    group = teachers(tmp_path / "t", [1, 1, 1])

    def everything(scores, classes):
        return torch.ones(len(scores), classes, dtype=torch.int64)

    with pytest.raises(ValueError, match="a teacher does not vote for 1 class"):
        evaluator(group, vote=everything).run()
    mechanism = LabelVoting(0.2, num_labels=2, most_positives=1)
    with pytest.raises(ValueError, match="a teacher does not vote for at most 1 labels"):
        evaluator(group, vote=everything, labeller=labeller(tmp_path, 3, mechanism)).run()
    keys = [f"pred{i}" for i in range(4)]
    other = labeller(tmp_path, 4, answers=tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="a teacher does not vote for 1 class"):
        PrivateVoted(keys, other, vote=everything)({"image": torch.rand(1, 2, 2), **{k: torch.rand(2) for k in keys}})


def test_an_ensemble_of_copies_or_with_an_onlooker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="named twice"):
        PrivateVoted(["pred0", "pred0"], labeller(tmp_path, 2))
    keys = [f"pred{i}" for i in range(4)]
    one = ensemble(tmp_path)
    one.networks = [one.networks[0], *one.networks[:3]]
    handler = PrivateVoteHandler(labeller(tmp_path, 4, answers=tmp_path / "b.jsonl"), keys)
    with pytest.raises(ValueError, match="the same weights"):
        handler.attach(one)
    other = ensemble(tmp_path)
    other.add_event_handler(IterationEvents.FORWARD_COMPLETED, lambda engine: None)
    with pytest.raises(ValueError, match="Attach this handler first"):
        handler.attach(other)


def test_files_of_others_are_taken_as_they_are_and_copies_are_not(tmp_path):
    paths = [teacher.checkpoint for teacher in teachers(tmp_path, [0, 1, 1])]
    assert len(TeacherSet.from_checkpoints(paths)) == 3
    with pytest.raises(ValueError, match="the same weights"):
        TeacherSet.from_checkpoints([*paths, paths[0]])
    with pytest.raises(ValueError, match="cannot be found"):
        TeacherSet.from_checkpoints([tmp_path / "none.pt"])


def test_weights_that_changed_or_do_not_fit_are_refused(tmp_path):
    (teacher,) = teachers(tmp_path, [1]).teachers
    with pytest.raises(ValueError, match="does not fit the network"):
        teacher.load_into(nn.Linear(2, 2))
    torch.save({"model": {"scores": torch.zeros(2)}}, teacher.checkpoint)
    with pytest.raises(ValueError, match="has changed since it was trained"):
        teacher.load_into(Net())


def test_a_teacher_that_was_interrupted_or_changed_is_trained_again(tmp_path):
    (teacher,) = teachers(tmp_path, [1]).teachers
    folder = tmp_path / "000"
    assert trained_teacher(folder, "shard 0", "") == teacher
    assert trained_teacher(folder, "shard 1", "") is None
    assert trained_teacher(folder, "shard 0", "other recipe") is None
    teacher.checkpoint.write_bytes(b"half")
    assert trained_teacher(folder, "shard 0", "") is None
    (folder / "teacher.json").write_text("{")
    assert trained_teacher(folder, "shard 0", "") is None


# --- votes of hospitals


def votes_of(hospital, rows, teachers=5, queries=("a", "b")):
    names = tuple(f"{hospital} {number}" for number in range(teachers))
    return HospitalVotes(hospital, teachers, queries, tuple(tuple(row) for row in rows), names, 1)


def test_hospitals_add_up_whatever_the_order_of_their_queries(tmp_path):
    files = [
        write_hospital_votes(votes_of("north", [[5, 0], [1, 4]]), tmp_path / "n.json"),
        write_hospital_votes(votes_of("south", [[2, 1], [0, 3]], 3, ("b", "a")), tmp_path / "s.json"),
    ]
    assert (tmp_path / "n.json").stat().st_mode & 0o077 == 0
    assert "5, 0" not in repr(read_hospital_votes(files[0]))
    names, total, number = total_votes([read_hospital_votes(file) for file in files])
    assert (names, total.tolist(), number) == (("a", "b"), [[5, 3], [3, 5]], 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: votes_of("north", [[5, 1], [1, 4]]), "north: the votes of 1 of 2 queries do not add up to 5"),
        (lambda: votes_of("north", [[5, 0]]), "votes on 1 queries with 2 names"),
        (lambda: votes_of("north", [[5, 0], [5, 0]], queries=("a", "a")), "twice on the same query"),
        (lambda: votes_of("north", [[5, 0], [5]]), "no table of whole numbers"),
        (lambda: votes_of("north", [[5, 0], [2.5, 2.5]]), "no table of whole numbers"),
        (lambda: votes_of(" ", [[5, 0], [5, 0]]), "name no hospital"),
        (lambda: votes_of("north", [[5, 0], [5, 0]], teachers=0), "num_teachers"),
        (lambda: total_votes([]), "no votes"),
        (
            lambda: total_votes([votes_of("North", [[5, 0], [1, 4]]), votes_of(" north", [[5, 0], [1, 4]])]),
            "north is there twice",
        ),
        (
            lambda: total_votes(
                [votes_of("n", [[5, 0], [1, 4]]), dataclasses.replace(votes_of("n", [[5, 0], [1, 4]]), hospital="s")]
            ),
            "5 teachers vote for two hospitals",
        ),
        (
            lambda: dataclasses.replace(votes_of("n", [[5, 0], [1, 4]]), teachers=("a",) * 5),
            "names 5, of which 1 are different",
        ),
        (lambda: total_votes([votes_of("n", [[5, 0], [1, 4]])] * 2), "n is there twice"),
        (
            lambda: total_votes([votes_of("n", [[5, 0], [1, 4]]), votes_of("s", [[5, 0], [1, 4]], queries=("a", "c"))]),
            "every teacher votes on every query",
        ),
    ],
)
def test_votes_that_do_not_add_up_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 9, "queries": [], "votes": []}'])
def test_files_that_hold_no_votes(tmp_path, text):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(ValueError, match="v\\.json"):
        read_hospital_votes(tmp_path / "v.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_hospital_votes(tmp_path / "none.json")
    (tmp_path / "v.json").write_text(
        json.dumps({"format": 2, "queries": ["a"], "votes": [[1, 0]], "teachers": [], "more": 1})
    )
    with pytest.raises(ValueError, match="holds no votes"):
        read_hospital_votes(tmp_path / "v.json")


# --- MONAI's ensembles


def ensemble(tmp_path, **changes):
    networks = []
    for number, chosen in enumerate([1, 1, 1, 0]):
        network = Net()
        network.scores.data = torch.tensor([1.0 - chosen, float(chosen)]) * (1 + number)
        networks.append(network)
    return EnsembleEvaluator(
        device=torch.device("cpu"),
        val_data_loader=loader(),
        networks=networks,
        pred_keys=[f"pred{i}" for i in range(4)],
        **changes,
    )


def test_a_transform_in_place_of_the_exact_vote(tmp_path):
    seen = []
    keys = [f"pred{i}" for i in range(4)]
    one = ensemble(tmp_path, postprocessing=PrivateVoted(keys, labeller(tmp_path, 4)))
    one.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.extend(engine.state.output))
    one.run()
    assert [int(item["pred"]) for item in seen] == [1] * QUERIES
    # MONAI keeps what a transform deletes, so that nothing but the label must stand there.
    assert all(item[key].tolist() == 1 for item in seen for key in keys)
    assert PrivacyLedger(tmp_path / "ledger.jsonl").entries[0].steps == QUERIES


def test_a_handler_replaces_predictions_before_anything_sees_them(tmp_path):
    seen, after = [], []
    keys = [f"pred{i}" for i in range(4)]
    one = ensemble(
        tmp_path, postprocessing=lambda item: seen.append(sorted(item)) or item,
        val_handlers=[PrivateVoteHandler(labeller(tmp_path, 4), keys)],
    )  # fmt: skip
    one.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: after.extend(engine.state.output))
    one.run()
    assert all("pred" in names and "pred0" not in names for names in seen)
    assert [int(item["pred"]) for item in after] == [1] * QUERIES


def test_a_handler_with_wrong_keys_stops(tmp_path):
    one = ensemble(tmp_path, val_handlers=[PrivateVoteHandler(labeller(tmp_path, 4), ["pred0", "pred9"])])
    with pytest.raises(ValueError, match="no pred9"):
        one.run()
    one = ensemble(
        tmp_path, val_handlers=[PrivateVoteHandler(labeller(tmp_path, 3, answers=tmp_path / "b"), ["pred0"])]
    )
    with pytest.raises(ValueError, match="do not add up to 3"):
        one.run()
