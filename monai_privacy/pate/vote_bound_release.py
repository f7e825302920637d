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

"""A bound on what labels cost at the votes there were, published with noise: charged first, drawn once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.mechanisms.noise import NoiseSource, SystemNoise
from monai_privacy.pate.answers import AnswerFile, require_newest
from monai_privacy.pate.vote_bound import (
    BOUNDED,
    BoundedMechanism,
    PrivateVoteCost,
    VoteBoundPlan,
    independent_rdp,
    plan_vote_bound,
    private_vote_cost,
    require_bounded,
)

__all__ = ["VoteBound", "release_vote_bound"]

FORMAT = 1
_NOTE = "bound after line "
_ASSUMPTIONS = (
    "whoever counted the votes is trusted, and kept them to itself",
    "the votes are those that the labels were drawn from",
    "order, beta and noise of the bound were chosen without a look at the votes",
    "which images were asked about did not depend on earlier labels",
)


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
        found = VoteBound(chosen, *bound, len(asked) * independent_rdp(mechanism, chosen.order), entry, file.mark)
        _write(found, output)
        ledger.commit(entry)
    return found


def _mechanism(file: AnswerFile) -> BoundedMechanism:
    """The mechanism that the answers were drawn by."""
    facts = file.heading.get("facts", {})
    kinds = {one.__name__: one for one in BOUNDED}
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
    require_bounded(made)
    return made


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
