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

"""Votes of many teachers on the same images, one teacher at a time, counted and not kept apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ignite.engine import Engine, EventEnum, Events
from monai.engines import Workflow
from monai.engines.utils import default_prepare_batch
from monai.inferers import Inferer, SimpleInferer
from monai.transforms import Compose, Randomizable
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from monai_privacy.accounting.values import checked_count
from monai_privacy.mechanisms.voting import require_ballots
from monai_privacy.pate.labelling import VoteLabeller, VoteLabels, query_digest
from monai_privacy.pate.teachers import TeacherSet

__all__ = ["TeacherVoteEvaluator", "VoteEvents", "most_likely_class"]


class VoteEvents(EventEnum):
    """What may become of queries; fired once for all of them, after the last teacher, in this order."""

    ANSWERED = "votes_answered"
    ABSTAINED = "votes_abstained"
    BUDGET_EXHAUSTED = "votes_budget_exhausted"


def most_likely_class(prediction: Tensor, num_classes: int) -> Tensor:
    """One vote a row: the class with the highest score, as counts of shape (rows, classes).

    Args:
        prediction: scores, shape (rows, classes), or (rows, 1) of a network that decides between two with one number.
        num_classes: number of classes.
    """
    scores = prediction.flatten(1)
    if scores.shape[1] == 1 and num_classes == 2:
        chosen = (scores[:, 0] > 0).long()
    elif scores.shape[1] == num_classes:
        chosen = scores.argmax(dim=1)
    else:
        raise ValueError(
            f"a teacher gives {scores.shape[1]} scores an image, but there are {num_classes} classes. Give a vote function "
            "that turns its output into counts."
        )
    return torch.nn.functional.one_hot(chosen, num_classes)


class TeacherVoteEvaluator(Workflow):
    """Asks every teacher about every image, and gives what the votes are worth to a :class:`VoteLabeller`.

    One epoch is one teacher: its weights are loaded into the one network on the device, in evaluation mode, so that
    hundreds of teachers need the memory of one. Votes are added up as they come; they are never in ``state.output``, in
    ``state.batch``'s successors, in a log or on the disk. After the last teacher the labels are in ``state.labels``.

    Args:
        device: where the network runs.
        val_data_loader: the images to be labelled, in a fixed order, without random transforms: each teacher must see the
            same. A :class:`~monai.data.DataLoader` over dictionaries.
        network: one network of the teachers' kind; its weights are overwritten.
        teachers: whose votes.
        labeller: answers from the votes, at a cost that the ledger has before; None to only count (``votes``).
        num_classes: number of classes, or of labels.
        vote: from a batch of predictions to counts, shape (rows, classes); :func:`most_likely_class` by default. For
            several labels see :func:`~monai_privacy.mechanisms.voting.limit_positives`.
        prepare_batch, inferer, val_handlers, amp, non_blocking: as of MONAI's ``SupervisedEvaluator``.

    Raises:
        ValueError: for a loader that shuffles or transforms at random, for a labeller whose costs are those of patients in
            fewer teachers, and in a run for predictions that are not finite or
            images that are not the same for every teacher; nothing is charged then.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: DataLoader[Any],
        network: nn.Module,
        teachers: TeacherSet,
        *,
        labeller: VoteLabeller | None = None,
        num_classes: int = 2,
        vote: Callable[[Tensor, int], Tensor] = most_likely_class,
        prepare_batch: Callable[..., Any] = default_prepare_batch,
        inferer: Inferer | None = None,
        val_handlers: Sequence[Any] | None = None,
        amp: bool = False,
        non_blocking: bool = False,
    ) -> None:
        _require_fixed(val_data_loader)
        if labeller is not None and labeller.teachers_per_patient < teachers.teachers_per_patient:
            raise ValueError(
                f"teachers_per_patient is {labeller.teachers_per_patient}, but patients are in "
                f"{teachers.teachers_per_patient} of these teachers: they move so many votes. Tell the mechanism."
            )
        self.network = network.to(device)
        self.teachers = teachers
        self.labeller = labeller
        self.num_classes = checked_count("num_classes", num_classes)
        self.vote = vote
        self.inferer = SimpleInferer() if inferer is None else inferer
        self._names: list[str] = []
        self._counts: Tensor | None = None
        self._row = 0
        super().__init__(
            device=device,
            max_epochs=len(teachers),
            data_loader=val_data_loader,
            non_blocking=non_blocking,
            prepare_batch=prepare_batch,
            handlers=val_handlers,
            amp=amp,
            decollate=False,
            event_names=[VoteEvents],
        )
        self.add_event_handler(Events.EPOCH_STARTED, TeacherVoteEvaluator._next_teacher)
        self.add_event_handler(Events.EPOCH_COMPLETED, TeacherVoteEvaluator._end_teacher)

    @property
    def queries(self) -> tuple[str, ...]:
        """Names of the images by their content, in the order of the loader."""
        return tuple(self._names)

    def votes(self) -> Tensor:
        """Counts, shape (queries, classes), after a run. PRIVATE: for whoever is trusted with them, and for nobody else."""
        if self._counts is None:
            raise RuntimeError("there are no votes yet: run the evaluator.")
        return self._counts.clone()

    def run(self) -> None:  # type: ignore[override]
        """Ask all teachers, and answer."""
        self._names, self._counts = [], None
        self.state.labels = None
        self.state.max_epochs, self.state.epoch, self.state.iteration = len(self.teachers), 0, 0
        super().run()
        if self.labeller is None or self._counts is None:
            return
        found: VoteLabels = self.labeller.label(self._names, self._counts)
        self._counts = None
        self.state.labels = found
        for happened, event in (
            (found.answered, VoteEvents.ANSWERED),
            (found.abstained, VoteEvents.ABSTAINED),
            (found.unaffordable, VoteEvents.BUDGET_EXHAUSTED),
        ):
            if happened:
                self.fire_event(event)

    def _next_teacher(self) -> None:
        teacher = self.teachers.teachers[self.state.epoch - 1]
        if teacher.checkpoint is not None:
            teacher.load_into(self.network, self.state.device)
        self._row = 0

    def _end_teacher(self) -> None:
        if self._row != len(self._names):
            raise ValueError(
                f"teacher {self.state.epoch - 1} saw {self._row} images, and the first one {len(self._names)}: each must "
                "see the same. Give a loader of fixed length."
            )

    def _iteration(self, engine: Engine, batchdata: dict[str, Any]) -> dict[str, Any]:
        prepared = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        inputs, further, named = prepared[0], (), {}
        if len(prepared) == 4:
            _, _, further, named = prepared
        rows = slice(self._row, self._row + len(inputs))
        self._check_images(inputs, rows)
        teacher = self.teachers.teachers[self.state.epoch - 1]
        if teacher.checkpoint is None:
            votes = torch.zeros(len(inputs), self.num_classes, dtype=torch.int64)
            votes[:, teacher.number % self.num_classes] = 1
        else:
            votes = self._ask(inputs, further, named, teacher.number)
        if self._counts is None or len(self._counts) < rows.stop:
            more = torch.zeros(len(inputs), self.num_classes, dtype=torch.int64)
            self._counts = more if self._counts is None else torch.cat([self._counts, more])
        self._counts[rows] += votes
        self._row = rows.stop
        return {}

    def _ask(self, inputs: Tensor, further: Any, named: Any, number: int) -> Tensor:
        self.network.eval()
        with torch.no_grad(), torch.autocast(torch.device(self.state.device).type, enabled=self.amp):
            prediction = self.inferer(inputs, self.network, *further, **named)
        if not bool(torch.isfinite(prediction).all()):
            raise ValueError(
                f"teacher {number} gives scores that are not finite: it cannot vote, and every teacher must. Train it "
                "again; nothing was charged."
            )
        votes = self.vote(prediction.float(), self.num_classes).to("cpu", torch.int64)
        if votes.shape != (len(inputs), self.num_classes):
            raise ValueError(
                f"the vote function gives shape {tuple(votes.shape)} for {len(inputs)} images and {self.num_classes} "
                "classes: it must give a count for each class."
            )
        if self.labeller is None:
            require_ballots(votes, 1, 1)
        else:
            self.labeller.check_ballots(votes)
        return votes

    def _check_images(self, inputs: Tensor, rows: slice) -> None:
        names = [query_digest(image) for image in inputs]
        if self.state.epoch == 1:
            self._names.extend(names)
        elif self._names[rows] != names:
            raise ValueError(
                f"teacher {self.state.epoch - 1} saw other images than the first one: a transform is random, or the order "
                "changes. Take random transforms out of the images to be labelled; nothing was charged."
            )


def _require_fixed(loader: DataLoader[Any]) -> None:
    if isinstance(getattr(loader, "sampler", None), (RandomSampler, WeightedRandomSampler)):
        raise ValueError(
            "val_data_loader draws its images at random, but every teacher must see the same. Do not shuffle."
        )
    random = _random_transforms(getattr(getattr(loader, "dataset", None), "transform", None))
    if random:
        raise ValueError(
            f"the images to be labelled go through {', '.join(sorted(set(random)))}, which is random, but every teacher "
            "must see the same. Leave it out; teachers may train with it."
        )


def _random_transforms(transform: Any) -> list[str]:
    if isinstance(transform, Compose):
        return [name for inner in transform.transforms for name in _random_transforms(inner)]
    return [type(transform).__name__] if isinstance(transform, Randomizable) else []
