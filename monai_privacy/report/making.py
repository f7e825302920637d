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


"""A report, recomputed from the lines of a ledger and from nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent
from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

from monai_privacy.accounting import accountants
from monai_privacy.accounting.event_json import event_to_dict
from monai_privacy.accounting.events import SmoothReleaseDpEvent, capped_images_event, composed, leaves
from monai_privacy.accounting.filters import allowance
from monai_privacy.accounting.ledger_state import LedgerEntry, LedgerState
from monai_privacy.accounting.risk import EPSILONS, rates_by_profile
from monai_privacy.report.numbers import finite
from monai_privacy.report.values import (
    DELTA_TOO_LARGE,
    FORMAL,
    NETWORK_ALONE,
    NOT_PRIVATE,
    NOTHING,
    PrivacyReport,
    ReportEntry,
)

_GROUP_SIZES = (2, 5, 10)
_NOT_COVERED = (
    "hyper-parameters that were chosen by looking at these patients",
    "statistics fitted on these patients, such as class weights or normalisation constants",
    "that the cohort exists, and who is in it by other sources",
    "a patient who appears under two ids",
    "whoever can read the memory or the disk of the training machine",
    "labels and images that were public anyway",
    "validation and test patients: their images were used without noise",
    "releases about the same patients that are not in this ledger",
)
_PACKAGES = ("monai-privacy", "dp-accounting", "monai", "torch")
_RATES = tuple(float(f"{rate:.3g}") for rate in np.logspace(-4, 0, 41))


def report_on(path: str | os.PathLike[str], *, lines: int | None = None) -> PrivacyReport:
    """The report on a ledger file, or on its first ``lines`` lines; writes nothing.

    Raises:
        LedgerError: where the ledger is damaged, or has fewer lines.
        FileNotFoundError: where there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no ledger file: name the ledger that the training wrote.")
    state = LedgerState.of_file(path, lines=lines)
    entries = tuple(entry for entry in state.entries if entry.steps)
    shared: dict[str, Any] = {
        "ledger": Path(path).name,
        "budget": asdict(state.budget) if state.budget else None,
        "cohort": asdict(state.cohort) if state.cohort else None,
        "ledger_lines": state.lines,
        "ledger_hash": state.last_hash,
        "begun": tuple(e.entry_id for e in state.entries if not e.steps and e.state == "reserved"),
        "not_covered": _NOT_COVERED,
        "versions": _versions(),
    }
    delta = state.delta
    if not entries or delta is None:
        return PrivacyReport(
            status=NOTHING, reasons=(), unit=None, epsilon=None, delta=None, accountant=None, bounds={},
            epsilon_reserved=None, without_amplification=None, other_units={}, risk={}, risk_curve=(), entries=(), **shared,
        )  # fmt: skip
    return PrivacyReport(
        unit=entries[0].unit,
        delta=delta,
        entries=tuple(_report_entry(entry) for entry in entries),
        **_numbers(state, entries, delta),
        **shared,
    )


def _numbers(state: LedgerState, entries: tuple[LedgerEntry, ...], delta: float) -> dict[str, Any]:
    """What is claimed; nothing where nothing holds."""
    bounds = state.bounds(delta)
    refused = tuple(dict.fromkeys(reason for entry in entries for reason in entry.not_private))
    if not refused and math.isinf(state.epsilon(delta)) and state.adaptive:
        refused = ("more was released or reserved than the budget's filter lets through",)
    if refused or not math.isfinite(bounds.epsilon):
        reasons = refused or ("no accountant finds a finite ε for what was released",)
        return {
            "status": NOT_PRIVATE, "reasons": reasons, "epsilon": None, "accountant": None,
            "bounds": {"pld": None, "rdp": None}, "epsilon_reserved": None, "without_amplification": None,
            "other_units": {}, "risk": {}, "risk_curve": (),
        }  # fmt: skip
    events = state.events()
    found: dict[str, float | None] = {"pld": finite(bounds.pld), "rdp": finite(bounds.rdp)}
    epsilon, accountant, reserved = bounds.epsilon, bounds.accountant, state.epsilon(delta, reserved=True)
    if state.cohort is not None and state.cohort.filter_order is not None and state.budget is not None:
        order = state.cohort.filter_order
        # Runs may have been chosen by what earlier ones gave: then the filter's bound holds, and not the realised one.
        epsilon = state.epsilon(delta)
        accountant = f"Rényi filter of order {order:g} (Feldman & Zrnic 2021)"
        found = {"filter": epsilon, **{f"{name} as if fixed beforehand": value for name, value in found.items()}}
        total = allowance(state.budget, order)
        deltas = np.array([float(compute_delta([order], [total], value)[0]) for value in EPSILONS])
        profiles = [np.where(epsilon <= EPSILONS, np.minimum(deltas, delta), deltas)]
    else:
        profiles = [accountants.delta_of(event, EPSILONS) for event in events]
    rates = np.max([rates_by_profile(EPSILONS, profile, np.array(_RATES)) for profile in profiles], axis=0)
    curve = tuple((rate, min(1.0, float(true))) for rate, true in zip(_RATES, rates, strict=True))
    status, reasons = _status(state, entries, delta)
    return {
        "status": status,
        "reasons": reasons,
        "epsilon": epsilon,
        "accountant": accountant,
        "bounds": found,
        "epsilon_reserved": finite(reserved),
        # Of what was released, which bounds nothing where runs may have been chosen by it.
        "without_amplification": None
        if state.adaptive
        else _largest(accountants.epsilon_without_amplification(event, delta) for event in events),
        "other_units": {} if state.adaptive else _other_units(events, delta, entries[0].unit),
        "risk": {f"{rate:g}": true for rate, true in curve if rate in (0.001, 0.01)},
        "risk_curve": curve,
    }


def _status(state: LedgerState, entries: tuple[LedgerEntry, ...], delta: float) -> tuple[str, tuple[str, ...]]:
    registered = state.cohort.num_units if state.cohort is not None else None
    known = [registered, *(entry.facts.get("num_patients") for entry in entries)]
    sizes = [size for size in known if isinstance(size, int) and not isinstance(size, bool)]
    if any(delta * size >= 1 for size in sizes):
        return DELTA_TOO_LARGE, (f"delta is {delta:g}, at or above 1 / number of units",)
    reasons = []
    if not state.within_budget():
        reasons.append("more was released or reserved than the budget allows")
    if not sizes:
        reasons.append(
            "how many units there are is not known, so nobody checked that delta is well below 1 / number of units"
        )
    unnoised = tuple(dict.fromkeys(item for entry in entries for item in entry.unnoised))
    alone = any(item.startswith("training") for item in unnoised)
    if alone:
        reasons += [f"left without noise: {item}" for item in unnoised]
    unknown = sum(entry.members != "checked" for entry in entries) if registered else 0
    if unknown:
        reasons.append(f"{unknown} runs did not say whose data they used, so they were not checked against the cohort")
    assumed = len({item for entry in entries for item in entry.assumptions})
    if assumed:
        reasons.append(f"it rests on {assumed} assumptions that no program can check")
    return NETWORK_ALONE if alone else FORMAL, tuple(reasons)


def _other_units(events: tuple[DpEvent, ...], delta: float, unit: str) -> dict[str, float | None]:
    if unit == "patient":
        # Exchanging a patient for one with another image is removing one and adding one.
        changed = _largest(accountants.group_epsilon(event, delta, 2) for event in events)
        return {"one image of a patient, removed or changed": changed}
    return {
        f"a patient with {size} images": _largest(_epsilon_of_images(event, delta, size) for event in events)
        for size in _GROUP_SIZES
    }


def _epsilon_of_images(event: DpEvent, delta: float, images: int) -> float:
    """ε of a patient with so many images, each drawn on its own coin: exact for DP-SGD, or the group bound."""
    parts = []
    for leaf, count in leaves(event).items():
        if not isinstance(leaf, dp_event.PoissonSampledDpEvent):
            return accountants.group_epsilon(event, delta, images)
        parts.append(
            capped_images_event(
                sample_rate=leaf.sampling_probability,
                noise_multiplier=leaf.event.noise_multiplier,
                max_images_per_patient=images,
                steps=count,
            )
        )
    return min(accountants.coarse_epsilon(composed(parts), delta), accountants.group_epsilon(event, delta, images))


def _largest(values: Iterable[float]) -> float | None:
    return finite(max(values))


def _mechanism(step: DpEvent) -> str:
    kinds = {type(leaf) for leaf in leaves(step)}
    if kinds <= {dp_event.PoissonSampledDpEvent, dp_event.TruncatedSubsampledGaussianDpEvent}:
        return "Gaussian noise on a sum of clipped gradients (DP-SGD)"
    if kinds == {dp_event.MixtureOfGaussiansDpEvent}:
        return (
            "Gaussian noise on a sum of clipped gradients of single images, certified for patients with at most so many"
        )
    if SmoothReleaseDpEvent in kinds:
        return "a number with Gaussian noise in proportion to its smooth sensitivity"
    if kinds == {dp_event.RepeatAndSelectDpEvent}:
        return "a run repeated a random number of times, of which the best was released"
    return (
        {dp_event.GaussianDpEvent: "Gaussian noise", dp_event.LaplaceDpEvent: "Laplace noise"}.get(
            next(iter(kinds)), "several"
        )
        if len(kinds) == 1
        else "several, one after another"
    )


def _sampling(step: DpEvent) -> str:
    for leaf in leaves(step):
        if isinstance(leaf, dp_event.PoissonSampledDpEvent):
            return f"Poisson, each unit on its own coin with probability {leaf.sampling_probability:.6g}"
        if isinstance(leaf, dp_event.TruncatedSubsampledGaussianDpEvent):
            return (
                f"Poisson, each unit on its own coin with probability {leaf.sampling_probability:.6g}, cut down at random "
                f"to {leaf.truncated_batch_size}"
            )
        if isinstance(leaf, dp_event.MixtureOfGaussiansDpEvent):
            return f"Poisson, each of at most {max(leaf.sensitivities):g} images of a patient on its own coin"
    return "none: every unit each time"


def _report_entry(entry: LedgerEntry) -> ReportEntry:
    planned = dp_event.SelfComposedDpEvent(entry.step, entry.planned_steps)
    private = not entry.not_private
    return ReportEntry(
        entry_id=entry.entry_id,
        purpose=entry.purpose,
        state=entry.state,
        mechanism=_mechanism(entry.step),
        sampling=_sampling(entry.step),
        epsilon=finite(accountants.epsilon(entry.event, entry.delta)) if private else None,
        epsilon_of_planned_steps=finite(accountants.epsilon(planned, entry.delta)) if private else None,
        delta=entry.delta,
        steps=entry.steps,
        planned_steps=entry.planned_steps,
        partition=entry.partition,
        members=entry.members,
        event=event_to_dict(entry.event),
        facts=dict(entry.facts),
        unnoised=entry.unnoised,
        assumptions=entry.assumptions,
        not_private=entry.not_private,
        artifacts=dict(entry.artifacts),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that was not installed
            found[name] = "not installed"
    return found
