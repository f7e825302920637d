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


"""A ledger for trainings that use Opacus by itself."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

from opacus.accountants import IAccountant
from opacus.accountants.registry import register_accountant

from monai_privacy.accounting.events import dpsgd_event
from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.accounting.values import PrivacyBudgetError, checked_count, checked_delta

_ASSUMPTIONS = (
    "Opacus trained: one row of its data loader is taken for one {unit}",
    "Opacus drew the batches by Poisson sampling (poisson_sampling=True, its default)",
    "Opacus clipped each row's gradient exactly: none of the network's layers mixes rows, and the loss takes a mean",
    "Opacus's noise is not cryptographically secure unless secure_mode was set",
)
_names = itertools.count()


def ledger_accountant(
    ledger: PrivacyLedger | str | os.PathLike[str],
    *,
    unit: str,
    planned_steps: int,
    delta: float,
    purpose: str = "",
) -> str:
    """The name of an accountant for Opacus's ``PrivacyEngine(accountant=...)`` that writes each step into a ledger.

    Each step is recorded after the noise was added and before the optimizer moves a weight; where it does not fit the
    budget, the step raises and no weight moves. ``privacy_engine.get_epsilon(delta)`` is then ε of the whole cohort.

    Args:
        ledger: the cohort's ledger, or its path.
        unit: "image", or "patient" where each patient has a single row in the data set. Opacus cannot know.
        planned_steps: the most optimizer steps of this training; they are reserved at the first one.
        delta: the δ of the claim.
        purpose: who trains and why, for the report.

    Example::

        engine = PrivacyEngine(accountant=ledger_accountant("ledger.jsonl", unit="image", planned_steps=900, delta=1e-5))
    """
    book = ledger if isinstance(ledger, PrivacyLedger) else PrivacyLedger(ledger)
    settings = {"unit": unit, "planned_steps": planned_steps, "delta": delta, "purpose": purpose}
    name = f"monai_privacy-{next(_names)}"
    # Opacus makes accountants by name and without arguments, so that each needs a name of its own.
    register_accountant(name, lambda: LedgerAccountant(book, **settings))  # type: ignore[arg-type]
    return name


class LedgerAccountant(IAccountant):
    """Opacus's accountant interface over a ledger; see :func:`ledger_accountant`.

    A training whose noise or sample rate changes on its way gets a new entry at each change, with the steps that the
    plan has left; the budget is asked again each time.

    Args:
        ledger: the cohort's ledger.
        unit: "image" or "patient".
        planned_steps: the most optimizer steps.
        delta: the δ of the claim.
        purpose: for the report.
    """

    def __init__(
        self, ledger: PrivacyLedger, *, unit: str, planned_steps: int, delta: float, purpose: str = ""
    ) -> None:
        super().__init__()
        self._ledger = ledger
        self._unit = unit
        self._left = checked_count("planned_steps", planned_steps)
        self._delta = checked_delta(delta)
        self._purpose = purpose
        self._entry: str | None = None

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Record one step before it is released.

        Raises:
            PrivacyBudgetError: where it does not fit; Opacus's optimizer then moves no weight.
        """
        event = dpsgd_event(sample_rate=sample_rate, noise_multiplier=noise_multiplier).event
        if self._entry is None or self._ledger.entry(self._entry).step != event:
            self._begin(event, noise_multiplier, sample_rate)
        assert self._entry is not None
        self._ledger.record_step(self._entry)
        self._left -= 1
        last = self.history[-1] if self.history else None
        if last is not None and last[:2] == (noise_multiplier, sample_rate):
            self.history[-1] = (noise_multiplier, sample_rate, last[2] + 1)
        else:
            self.history.append((noise_multiplier, sample_rate, 1))

    def get_optimizer_hook_fn(self, sample_rate: float) -> Any:
        """Opacus's hook, which records each optimizer step; refuses steps over several batches.

        Opacus counts such a step as one draw at a higher rate, but a row that is in several of its batches adds several
        clipping norms.
        """

        def hook(optimizer: Any) -> None:
            if optimizer.accumulated_iterations != 1:
                raise ValueError(
                    f"the step adds up {optimizer.accumulated_iterations} batches: a row in several of them counts several "
                    "times, which its sample rate does not say. Take one batch a step; BatchMemoryManager bounds memory."
                )
            self.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=sample_rate)

        return hook

    def get_epsilon(self, delta: float, *args: Any, **kwargs: Any) -> float:
        """ε at ``delta`` of everything on the cohort's ledger, other trainings included."""
        return self._ledger.epsilon(delta)

    def __len__(self) -> int:
        return sum(count for _, _, count in self.history)

    @classmethod
    def mechanism(cls) -> str:
        """Name of the accountant in Opacus's checkpoints."""
        return "monai_privacy"

    def state_dict(self, destination: Any = None) -> Any:
        """Opacus's, with the name of the ledger entry, so that a resumed training continues it."""
        found = super().state_dict(destination)
        found["ledger_entry"] = self._entry
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the entry of a checkpoint; the steps on the ledger stay, whatever the checkpoint knows of them.

        Raises:
            LedgerError: where the ledger has no such entry.
        """
        super().load_state_dict(state_dict)  # type: ignore[arg-type]
        name = state_dict.get("ledger_entry")
        if name is not None:
            entry = self._ledger.entry(name)
            self._left = entry.planned_steps - entry.steps
            if entry.state != "reserved" and self._left:
                self._ledger.reopen(name, fewest_steps=1)
        self._entry = name

    def commit(self) -> None:
        """Say that the training has ended, so that steps that it did not use are free again."""
        if self._entry is not None:
            self._ledger.commit(self._entry)

    def _begin(self, event: Any, noise_multiplier: float, sample_rate: float) -> None:
        if self._left < 1:
            raise PrivacyBudgetError(
                "all planned steps are recorded, and the noise or the sample rate has changed: nothing was released. Raise "
                "planned_steps."
            )
        if self._entry is not None and self._ledger.entry(self._entry).state == "reserved":
            self._ledger.commit(self._entry)
        self._entry = self._ledger.reserve(
            step=event,
            planned_steps=self._left,
            delta=self._delta,
            unit=self._unit,
            purpose=self._purpose,
            facts={"engine": "Opacus", "noise_multiplier": noise_multiplier, "sample_rate": sample_rate},
            assumptions=tuple(text.format(unit=self._unit) for text in _ASSUMPTIONS),
        )
