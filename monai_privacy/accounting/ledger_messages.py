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


"""Why a ledger refuses a step, and what to do about it, in one line each."""

from __future__ import annotations

from collections.abc import Sequence

from monai_privacy.accounting.ledger_state import LedgerEntry
from monai_privacy.accounting.values import PrivacyBudget


def spent(
    path: object, budget: PrivacyBudget | None, entry: LedgerEntry, granted: int, others: Sequence[LedgerEntry] = ()
) -> str:
    """Where a run needs more steps than the budget has room for, beside other runs."""
    waiting = [one.entry_id[:8] for one in others if one.state == "reserved" and one.steps_left]
    freed = (
        f" Steps are reserved for {', '.join(waiting)}: resume that run, or free them by 'ledger commit' if it is over."
        if waiting
        else ""
    )
    if entry.not_private:
        return (
            f"the run is not private ({'; '.join(entry.not_private)}), so it does not fit the budget {say(budget)} of "
            f"{path}: nothing was released. Debug with a ledger that has no budget."
        )
    if granted > entry.steps:
        return (
            f"the budget {say(budget)} of {path} has room for {granted} of {entry.planned_steps} steps beside what was "
            "released and reserved before, so nothing was reserved. Plan so many steps, or more noise (see "
            f"'ledger what-if'), or set fewest_steps.{freed}"
        )
    return (
        f"the budget {say(budget)} of {path} is spent or reserved: the next step does not fit, so nothing was released. "
        f"Ask the cohort's data steward; a new ledger for the same patients would hide what they lost.{freed}"
    )


def full(path: object, budget: PrivacyBudget | None, entry: LedgerEntry) -> str:
    """Where a run has recorded all the steps that it may."""
    name = f"entry {entry.entry_id[:8]} of {path}"
    if entry.state != "reserved" and entry.steps < entry.planned_steps:
        return f"{name} is {entry.state}, so its run has ended: nothing was released. Reopen it, or plan a new run."
    if entry.steps < entry.planned_steps:
        return (
            f"{name} has recorded all {entry.granted} steps that the budget {say(budget)} left of its {entry.planned_steps} "
            "planned ones: nothing was released. Ask the cohort's data steward."
        )
    planned = f"all {entry.planned_steps} planned steps"
    return f"{name} has recorded {planned}: nothing was released. Plan more steps in a new run."


def say(budget: PrivacyBudget | None) -> str:
    """A budget in words."""
    return "none" if budget is None else f"(epsilon {budget.epsilon:g}, delta {budget.delta:g})"
