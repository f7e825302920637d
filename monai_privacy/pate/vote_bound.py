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

"""What labels cost at the votes there were: a private number, and how it is published with noise."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dp_accounting.dp_event import DpEvent, SelfComposedDpEvent
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor

from monai_privacy.accounting.accountants import epsilon
from monai_privacy.accounting.events import composed, gaussian_event, leaves, smooth_release_event
from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.accounting.values import checked_count, checked_delta, checked_positive
from monai_privacy.accounting.vote_costs import (
    gnmax_log_q,
    gnmax_rdp,
    threshold_log_probability,
    threshold_rdp,
)
from monai_privacy.accounting.vote_sensitivity import (
    gnmax_bound_is_continuous,
    gnmax_local_sensitivity,
    smooth_release_limit,
    smooth_release_rdp,
    smooth_sensitivity,
    threshold_local_sensitivity,
)
from monai_privacy.mechanisms.confident_voting import ConfidentGNMax
from monai_privacy.mechanisms.noise import NoiseSource, SystemNoise
from monai_privacy.mechanisms.voting import GNMax
from monai_privacy.pate.answers import AnswerFile, require_newest

__all__ = [
    "PrivateVoteCost",
    "VoteBound",
    "VoteBoundPlan",
    "plan_vote_bound",
    "private_vote_cost",
    "release_vote_bound",
]

FORMAT = 1
BoundedMechanism = GNMax | ConfidentGNMax
_BOUNDED = (GNMax, ConfidentGNMax)
# Where plans look for the smallest bound: Rényi orders, shares of the beta at which the divergence is infinite, noise.
_ORDERS = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0, 24.0, 28.0, 32.0, 40.0, 48.0, 64.0)
_BETAS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
_NOISES = (3.0, 4.0, 6.0, 8.0, 11.0, 16.0, 22.0, 32.0, 45.0, 64.0, 90.0)
_SENSITIVITY_NOISES = (4.0, 8.0, 16.0, 32.0)
# So that its logarithm is finite; a larger number is as good a smooth sensitivity.
_LEAST_SENSITIVITY = 1e-12
_NOTE = "bound after line "
_ASSUMPTIONS = (
    "whoever counted the votes is trusted, and kept them to itself",
    "the votes are those that the labels were drawn from",
    "order, beta and noise of the bound were chosen without a look at the votes",
    "which images were asked about did not depend on earlier labels",
)


@dataclass(frozen=True)
class VoteBoundPlan:
    """The public numbers of a published bound, chosen before anybody looks at the votes.

    Args:
        order: Rényi order of the bound.
        beta: of the smooth sensitivity; so small that the divergence of ``order`` is finite.
        noise_multiplier: noise on the bound, over its smooth sensitivity.
        sensitivity_noise_multiplier: noise on the logarithm of the smooth sensitivity, over ``beta``.
        delta: δ of the ε that is told.
        miss_probability: chance that the noise makes the published number too small.
        expected_epsilon: what the labels and this release would cost together, if teachers agree as was assumed; None where
            nobody reckoned it.
        independent_epsilon: what the labels cost whatever the votes; likewise.
    """

    order: float
    beta: float
    noise_multiplier: float
    sensitivity_noise_multiplier: float
    delta: float
    miss_probability: float = 1e-6
    expected_epsilon: float | None = None
    independent_epsilon: float | None = None

    def __post_init__(self) -> None:
        checked_delta(self.delta)
        checked_delta(self.miss_probability)
        checked_positive("sensitivity_noise_multiplier", self.sensitivity_noise_multiplier)
        smooth_release_rdp(self.order, self.beta, self.noise_multiplier)

    @property
    def event(self) -> DpEvent:
        """What the release costs: the bound, and the logarithm of its smooth sensitivity, which moves by at most β."""
        bound = smooth_release_event(beta=self.beta, noise_multiplier=self.noise_multiplier)
        return composed([bound, gaussian_event(self.sensitivity_noise_multiplier)])

    @property
    def rdp(self) -> float:
        """Rényi divergence of the release at ``order``."""
        size = self.order / (2 * self.sensitivity_noise_multiplier**2)
        return smooth_release_rdp(self.order, self.beta, self.noise_multiplier) + size

    @property
    def quantile(self) -> float:
        """What a normal number exceeds with half the ``miss_probability``."""
        return float(norm.isf(self.miss_probability / 2))

    def epsilon(self, rdp: float) -> float:
        """ε at ``delta`` of a Rényi divergence of ``order``."""
        return float(compute_epsilon([self.order], [rdp], self.delta)[0])


@dataclass(frozen=True)
class PrivateVoteCost:
    """PRIVATE: what the labels cost at these votes, and how much that could be on votes nearby. Never to be shown.

    Args:
        rdp: Rényi divergence of all questions and answers, at the plan's order.
        smooth_sensitivity: of that number.
    """

    rdp: float = field(repr=False)
    smooth_sensitivity: float = field(repr=False)


@dataclass(frozen=True)
class VoteBound:
    """A published bound on what the labels cost at the votes there were.

    Args:
        plan: its public numbers.
        noisy_rdp: the Rényi divergence with noise.
        noisy_log_sensitivity: the logarithm of the smooth sensitivity with noise.
        independent_rdp: what the divergence is at most whatever the votes.
        entry: the ledger's entry of this release.
        answers: the last line of the file of answers that it is about.

    Guarantee: but for ``plan.miss_probability`` of the noise, whatever the labels may show had at these votes a probability
    of at most e^ε times, plus δ, what it would have had without any one teacher's patient, ε being :attr:`epsilon`. That is
    one direction (Papernot et al. 2018, Theorem 6): how much less probable it became is not bounded but by the ledger's ε.
    The published numbers are one release on the ledger.
    """

    plan: VoteBoundPlan
    noisy_rdp: float
    noisy_log_sensitivity: float
    independent_rdp: float
    entry: str
    answers: str

    @property
    def rdp(self) -> float:
        """The Rényi divergence of the labels at the plan's order, at most."""
        plan = self.plan
        largest = math.exp(self.noisy_log_sensitivity + plan.quantile * plan.beta * plan.sensitivity_noise_multiplier)
        bound = self.noisy_rdp + plan.quantile * plan.noise_multiplier * largest
        return min(max(0.0, bound), self.independent_rdp)

    @property
    def epsilon(self) -> float:
        """ε of the labels at these votes."""
        return self.plan.epsilon(self.rdp)

    @property
    def epsilon_with_release(self) -> float:
        """ε of the labels at these votes and of this bound, together."""
        return self.plan.epsilon(self.rdp + self.plan.rdp)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the claims beside the numbers that they are made of."""
        claims = {"rdp": self.rdp, "epsilon": self.epsilon, "epsilon_with_release": self.epsilon_with_release}
        return {"format": FORMAT, **claims, **asdict(self)}


def plan_vote_bound(
    mechanism: BoundedMechanism,
    *,
    num_teachers: int,
    num_queries: int,
    num_classes: int,
    delta: float,
    agreement: float = 0.9,
    miss_probability: float = 1e-6,
    filter_order: float | None = None,
) -> VoteBoundPlan:
    """Choose order and noise of a bound for votes in which so many teachers agree, without a look at the true ones.

    Args:
        mechanism: :class:`~monai_privacy.mechanisms.GNMax` or :class:`~monai_privacy.mechanisms.ConfidentGNMax`.
        num_teachers, num_queries, num_classes: of the votes.
        delta: δ of the ε that is told.
        agreement: assumed share of the teachers that give the same label.
        miss_probability: chance that the noise makes the published number too small.
        filter_order: the Rényi order that the ledger accounts with, where its budget is adaptive.

    Raises:
        ValueError: for a mechanism whose bound is not proved, or noise that no order has a proof for.
    """
    _require_bounded(mechanism)
    teachers, queries = checked_count("num_teachers", num_teachers), checked_count("num_queries", num_queries)
    if not 1 / num_classes <= agreement <= 1:
        raise ValueError(f"agreement is {agreement}, but it must lie between 1 / {num_classes} and 1.")
    winner = round(agreement * teachers)
    others = np.diff(np.linspace(0, teachers - winner, num_classes).round().astype(int))
    votes = np.array([[winner, *others]])
    independent = epsilon(SelfComposedDpEvent(composed(_events(mechanism)), queries), delta)
    quantile = float(norm.isf(miss_probability / 2))
    best: VoteBoundPlan | None = None
    smallest = math.inf
    for order in _ORDERS:
        try:
            rdp, local = _cost(mechanism, order, votes, teachers)
        except ValueError:
            continue  # nothing is proved at this order
        for share in _BETAS:
            beta = share * smooth_release_limit(order)
            if filter_order is not None and beta >= smooth_release_limit(filter_order):
                continue
            smooth = max(_LEAST_SENSITIVITY, smooth_sensitivity(queries * local[None], beta))
            for noise, size_noise in product(_NOISES, _SENSITIVITY_NOISES):
                plan = VoteBoundPlan(order, beta, noise, size_noise, delta, miss_probability)
                upper = queries * rdp + quantile * noise * smooth * math.exp(quantile * beta * size_noise)
                expected = plan.epsilon(upper + plan.rdp)
                if expected < smallest:
                    best, smallest = plan, expected
    if best is None:
        raise ValueError(
            "with this noise nothing is proved about votes nearby (conditions C5 and C6): take more noise, or publish what "
            "the labels cost whatever the votes."
        )
    return replace(best, expected_epsilon=smallest, independent_epsilon=independent)


def private_vote_cost(
    plan: VoteBoundPlan, mechanism: BoundedMechanism, votes: Tensor, num_teachers: int
) -> PrivateVoteCost:
    """What labels cost at these votes: PRIVATE, as it is made of them.

    Each query counts as answered, also where ``ConfidentGNMax`` abstained: how many were answered came of the noise, and a
    sum over those alone would be no Rényi divergence of anything fixed beforehand.

    Args:
        plan: order and beta.
        mechanism: how the votes became labels.
        votes: counts, integers of shape (queries, classes), of all queries that were asked.
        num_teachers: number of teachers, each with one vote on each query.

    Reference: Papernot et al. 2018, arXiv:1802.08908, Theorem 6, Propositions 7 and 10, Appendix B.
    """
    _require_bounded(mechanism)
    mechanism.check(votes, num_teachers)
    rdp, local = _cost(mechanism, plan.order, votes.numpy(), num_teachers)
    return PrivateVoteCost(rdp, max(_LEAST_SENSITIVITY, smooth_sensitivity(local[None], plan.beta)))


def release_vote_bound(
    queries: Sequence[str],
    votes: Tensor,
    ledger: PrivacyLedger,
    answers: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    teachers: str = "",
    agreement: float = 0.9,
    plan: VoteBoundPlan | None = None,
    purpose: str = "",
    noise: NoiseSource | None = None,
) -> VoteBound:
    """Publish what the labels of a file of answers cost at the votes there were: charged first, drawn once.

    Args:
        queries: a name for each row of votes, as when they were answered.
        votes: the same counts, integers of shape (queries, classes); they leave no trace.
        ledger: that of the teachers' patients.
        answers: the file of answers.
        output: JSON file for the bound; where it has one of the same answers, that is returned, and nothing is charged.
        teachers: what names the teachers in the file of answers.
        agreement: share of the teachers that was assumed to agree before the votes were seen, for the plan.
        plan: other numbers, chosen before the votes were seen.
        purpose: who asks and why, for the report.
        noise: where the noise comes from.

    Raises:
        PrivacyBudgetError: where it does not fit the budget.
        LedgerError: where the ledger is another one, or an older copy.
        ValueError: where nothing would be gained, the votes are not those of the answers, or the file cannot be written;
            nothing is charged.
    """
    if not Path(answers).exists():
        raise ValueError(f"{answers} does not exist: name the file that remembers the answers.")
    source = noise or SystemNoise()
    file = AnswerFile(answers)
    with file.locked():
        mechanism = _mechanism(file)
        num_teachers = int(file.heading["facts"]["num_teachers"])
        require_newest(ledger, file)
        if file.heading["teachers"] != teachers:
            raise ValueError(f"{file.path} holds answers of other teachers: give the votes that were labelled.")
        asked = sorted(set(file.answers) | file.passed)
        known = _read(output, file)
        if known is not None:
            return known
        rows = dict(zip(queries, range(len(queries)), strict=True))
        if len(queries) != len(votes) or len(rows) != len(queries) or not asked or not set(asked) <= set(rows):
            raise ValueError(
                f"{len(asked)} queries were asked, of which {len(set(asked) & set(rows))} are among the {len(votes)} rows "
                "of votes: give the votes of every query that was asked, each once."
            )
        counts = votes[[rows[name] for name in asked]]
        chosen = plan or plan_vote_bound(
            mechanism,
            num_teachers=num_teachers,
            num_queries=len(asked),
            num_classes=counts.shape[1],
            delta=file.heading["delta"],
            agreement=agreement,
            filter_order=None if ledger.cohort is None else ledger.cohort.filter_order,
        )
        expected, independent = chosen.expected_epsilon, chosen.independent_epsilon
        if expected is not None and independent is not None and expected >= independent:
            raise ValueError(
                f"where {agreement:.0%} of {num_teachers} teachers agree, labels and bound together would be told to cost ε "
                f"{expected:.3g}, and the labels cost {independent:.3g} whatever the votes: nothing would be gained. More "
                "teachers would help, or more agreement, if it was expected beforehand."
            )
        cost = private_vote_cost(chosen, mechanism, counts, num_teachers)
        _require_writable(output)
        entry = _charge(chosen, ledger, file, purpose, secret=source.is_secret)
        bound = _draw(chosen, cost, source)
        found = VoteBound(chosen, *bound, len(asked) * _independent_rdp(mechanism, chosen.order), entry, file.mark)
        _write(found, output)
        ledger.commit(entry)
    return found


def _require_bounded(mechanism: object) -> None:
    if type(mechanism) not in _BOUNDED or getattr(mechanism, "teachers_per_patient", 1) != 1:
        raise ValueError(
            f"a bound on what votes cost is proved for GNMax and ConfidentGNMax with each patient in one teacher, not for "
            f"{mechanism}: what it costs whatever the votes is on the ledger."
        )


def _mechanism(file: AnswerFile) -> BoundedMechanism:
    """The mechanism that the answers were drawn by."""
    facts = file.heading.get("facts", {})
    kinds = {one.__name__: one for one in _BOUNDED}
    kind = kinds.get(facts.get("mechanism"))
    if kind is None:
        raise ValueError(
            f"{file.path} holds answers of {facts.get('mechanism', 'nobody')}, but a bound on what votes cost is proved for "
            f"{' and '.join(kinds)} alone: what they cost whatever the votes is on the ledger."
        )
    if file.thresholds:
        raise ValueError(
            f"{file.path} holds answers to questions with another threshold than {facts['threshold']:g}: what they cost "
            "whatever the votes is on the ledger."
        )
    made = kind(**{one.name: facts[one.name] for one in fields(kind)})
    _require_bounded(made)
    return made


def _events(mechanism: BoundedMechanism) -> list[DpEvent]:
    return [event for event in (mechanism.question_event, mechanism.answer_event) if event is not None]


def _independent_rdp(mechanism: BoundedMechanism, order: float) -> float:
    """Of one query, whatever the votes."""
    return sum(
        count * order / (2 * event.noise_multiplier**2) for event, count in leaves(composed(_events(mechanism))).items()
    )


def _cost(
    mechanism: BoundedMechanism, order: float, votes: NDArray[Any], teachers: int
) -> tuple[float, NDArray[np.float64]]:
    """The Rényi divergence, and by how much it could change on votes so many teachers away, shape (teachers,)."""
    std = mechanism.noise_std
    if not gnmax_bound_is_continuous(std, order):
        raise ValueError(
            f"at order {order:g} with noise_std {std:g} the bound jumps, which no sensitivity covers: choose a higher order."
        )
    rdp = float(gnmax_rdp(gnmax_log_q(votes, std), std, [order]).sum())
    local = gnmax_local_sensitivity(votes, teachers, std, order).sum(axis=0)
    if isinstance(mechanism, ConfidentGNMax):
        largest, threshold, std = votes.max(axis=1), mechanism.threshold, mechanism.threshold_noise_std
        rdp += float(threshold_rdp(threshold_log_probability(largest, threshold, std), std, [order]).sum())
        local = local + threshold_local_sensitivity(largest, teachers, threshold, std, order).sum(axis=0)
    return rdp, local


def _charge(plan: VoteBoundPlan, ledger: PrivacyLedger, file: AnswerFile, purpose: str, *, secret: bool) -> str:
    """The charge of one release, on the disk."""
    for entry in ledger.entries:  # of somebody who was interrupted here before
        ours = entry.note.startswith(_NOTE) and file.holds(entry.note.removeprefix(_NOTE))
        if ours and entry.state == "reserved":
            if entry.steps:
                ledger.commit(entry.entry_id)
            else:
                ledger.void(entry.entry_id)
    name = ledger.reserve(
        step=plan.event,
        planned_steps=1,
        delta=plan.delta,
        unit=file.heading["unit"],
        purpose=purpose or "a bound on what the labels cost at the votes there were",
        facts={key: value for key, value in asdict(plan).items() if value is not None},
        assumptions=_ASSUMPTIONS,
        not_private=() if secret else ("the noise of the bound is repeatable",),
        note=_NOTE + file.mark,
    )
    # Each file knows of the other: an older copy of either is noticed, and draws nothing a second time.
    file.write_bound(name)
    ledger.write_note(str(file.heading["entries"]["pay"]), file.mark)
    ledger.record_step(name)
    return name


def _draw(plan: VoteBoundPlan, cost: PrivateVoteCost, noise: NoiseSource) -> tuple[float, float]:
    """The noisy divergence, and the noisy logarithm of its smooth sensitivity."""
    rdp, size = (torch.tensor([one], dtype=torch.float64) for one in (cost.rdp, math.log(cost.smooth_sensitivity)))
    (noisy,) = noise.add_gaussian([rdp], cost.smooth_sensitivity * plan.noise_multiplier)
    (noisy_size,) = noise.add_gaussian([size], plan.beta * plan.sensitivity_noise_multiplier)
    return float(noisy), float(noisy_size)


def _require_writable(output: str | os.PathLike[str]) -> None:
    try:
        _partial(output).write_text("", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{output} cannot be written ({error.strerror}): name a file in a folder that exists."
        ) from error


def _partial(output: str | os.PathLike[str]) -> Path:
    return Path(output).with_name(Path(output).name + ".partial")


def _write(bound: VoteBound, output: str | os.PathLike[str]) -> None:
    partial = _partial(output)
    partial.write_text(json.dumps(bound.to_dict(), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output)


def _read(output: str | os.PathLike[str], file: AnswerFile) -> VoteBound | None:
    """The bound that was published before, of the same answers; None where there is none."""
    path = Path(output)
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = [one.name for one in fields(VoteBound)]
        found = VoteBound(**{name: values[name] for name in names} | {"plan": VoteBoundPlan(**values["plan"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is there and holds no bound ({error}). Name another file.") from error
    if found.answers != file.mark:
        raise ValueError(
            f"{path} holds a bound of other answers. Name another file: a bound of these is another release, and charged."
        )
    return found
