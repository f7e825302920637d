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

"""How a training run behaves towards its ledger: it asks for room, begins or continues an entry, records each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.accounting.ledger_file import LedgerError
from monai_privacy.accounting.ledger_state import LedgerEntry
from monai_privacy.accounting.values import PrivacyBudgetError
from monai_privacy.distributed import ProcessGroup
from monai_privacy.plan import DPSGDPlan
from monai_privacy.provenance import network_digest


class LedgerConduct:
    """A run's dealings with its ledger; of several processes, the first one's.

    Args:
        plan: the run's numbers.
        ledger: where they are recorded.
        group: the processes of the run.
        ids: of the run's units, to check against a registered cohort.
        partition: the part of the cohort that it sees.
        fewest_steps: of the plan, that must fit the budget; all where None.
        purpose: who trains and why.
        artifacts: SHA-256 of code and configs, by name.
        unnoised: what leaves without noise, in words.
        assumptions: what the claim rests on.
        not_private: why the run is not private at all; empty where it is.
    """

    def __init__(
        self,
        plan: DPSGDPlan,
        ledger: PrivacyLedger,
        group: ProcessGroup,
        *,
        ids: Sequence[str],
        partition: int | None,
        fewest_steps: int | None,
        purpose: str,
        artifacts: Mapping[str, str],
        unnoised: Sequence[str],
        assumptions: Sequence[str],
        not_private: Sequence[str],
    ) -> None:
        self._plan = plan
        self._ledger = ledger
        self._group = group
        self._ids = tuple(ids)
        self._partition = partition
        self._fewest_steps = fewest_steps
        self._purpose = purpose
        self._artifacts = dict(artifacts)
        self._unnoised = tuple(unnoised)
        self._assumptions = tuple(assumptions)
        self._not_private = tuple(not_private)

    def require_room(self) -> int:
        """How many of the planned steps the budget has room for; refuses a new run for which they are too few.

        Raises:
            PrivacyBudgetError: then; nothing is written.
        """
        steps: int = self._group.first_says(
            lambda: self._ledger.require_room(
                step=self._plan.step_event,
                planned_steps=self._plan.steps,
                unit=self._plan.unit,
                fewest_steps=self._fewest_steps,
                ids=self._ids,
                partition=self._partition,
                not_private=self._not_private,
            )
        )
        return steps

    def begin_or_continue(self, entry_id: str | None, iteration: int) -> str:
        """The entry of a run that has done so many iterations; a new one where ``entry_id`` is None.

        Raises:
            ValueError: where the entry is that of another plan, or of a run that let out less.
            LedgerError: where the ledger is older than the checkpoint.
        """
        found: str = self._group.first_says(self._begin) if entry_id is None else entry_id
        self._require_same_run(self._ledger.entry(found), iteration)
        self._group.first_does(lambda: self._ledger.require_members(found, self._ids, self._partition))
        # A run that was committed when it ended goes on where there are steps to do.
        self._group.first_does(lambda: self._ledger.reopen(found, fewest_steps=1))
        return found

    def end(self, entry_id: str, network: nn.Module) -> None:
        """Say that the run has ended and what came out, so that steps that it did not use are free again."""
        # The first process alone, and nobody waits for it: a handler that only it has may call this as well.
        if not self._group.is_first:
            return
        entry = self._ledger.entry(entry_id)
        if entry.state == "reserved" and entry.steps:
            self._ledger.commit(entry_id, artifacts={"model": network_digest(network)})

    def record_step(self, entry_id: str) -> None:
        """Write the next step down, before it is released."""
        self._group.first_does(lambda: self._ledger.record_step(entry_id))

    def steps_left(self, entry_id: str) -> int:
        """How many more steps fit the plan and the budget."""
        left: int = self._group.first_says(lambda: self._ledger.steps_left(entry_id))
        return left

    def require_steps_left(self, entry_id: str) -> None:
        """Refuse to go on where not even one more step fits.

        Raises:
            PrivacyBudgetError: then.
        """
        if self.steps_left(entry_id) < 1:
            entry = self._ledger.entry(entry_id)
            raise PrivacyBudgetError(
                f"entry {entry.entry_id[:8]} of {self._ledger.path} has no step left of {entry.planned_steps} planned "
                f"({entry.steps} recorded) within budget {self._ledger.budget}: nothing was released. Plan a new run."
            )

    def _begin(self) -> str:
        return self._ledger.reserve(
            step=self._plan.step_event,
            planned_steps=self._plan.steps,
            fewest_steps=self._fewest_steps,
            delta=self._plan.delta,
            unit=self._plan.unit,
            ids=self._ids,
            partition=self._partition,
            purpose=self._purpose,
            artifacts=self._artifacts,
            facts=self._plan.to_dict(),
            unnoised=self._unnoised,
            assumptions=self._assumptions,
            not_private=self._not_private,
        )

    def _require_same_run(self, entry: LedgerEntry, iteration: int) -> None:
        """A resumed run keeps its plan and lets out no more than its entry says."""
        if dict(entry.facts) != self._plan.to_dict() or (entry.step, entry.unit) != (
            self._plan.step_event,
            self._plan.unit,
        ):
            raise ValueError(
                f"the checkpoint continues entry {entry.entry_id[:8]}, planned as {dict(entry.facts)}, but the plan is "
                f"now {self._plan.to_dict()}: a run keeps its plan. Resume with that plan, or load the network alone."
            )
        more = {*self._not_private, *self._unnoised, *self._assumptions}
        more -= {*entry.not_private, *entry.unnoised, *entry.assumptions}
        if more:
            raise ValueError(
                f"the checkpoint continues entry {entry.entry_id[:8]}, which does not have: {'; '.join(sorted(more))}. "
                "Resume with the settings of that run, or load the network alone to begin a new entry."
            )
        if iteration > entry.steps:
            raise LedgerError(
                f"the checkpoint is at step {iteration}, but {self._ledger.path} has only {entry.steps} steps of this run: "
                "it is an older copy. Put the newest ledger back; nothing was released."
            )
