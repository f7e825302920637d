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


"""Opacus's own engine on a cohort's ledger, by one changed argument."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from dp_accounting.dp_event import SelfComposedDpEvent
from opacus import PrivacyEngine
from opacus.accountants import RDPAccountant, create_accountant
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from monai_privacy import (
    LedgerError,
    PrivacyBudget,
    PrivacyBudgetError,
    PrivacyLedger,
    PrivacyReport,
    ledger_accountant,
)
from monai_privacy.accounting import affordable_steps, dpsgd_event, epsilon
from monai_privacy.opacus_accountant import LedgerAccountant

STEP = dpsgd_event(sample_rate=0.25, noise_multiplier=2.0).event
SETTINGS = {"unit": "image", "planned_steps": 12, "delta": 1e-3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def train(accountant: str, *, epochs: int = 2, network: nn.Module | None = None) -> tuple[PrivacyEngine, nn.Module]:
    """Opacus's usual lines."""
    torch.manual_seed(0)
    network = network or nn.Linear(3, 2)
    data = TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PrivacyEngine(accountant=accountant)
        network, optimizer, loader = engine.make_private(
            module=network,
            optimizer=torch.optim.SGD(network.parameters(), 0.1),
            data_loader=DataLoader(data, batch_size=8),
            noise_multiplier=2.0,
            max_grad_norm=1.0,
        )
        for _ in range(epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(images), labels).backward()
                optimizer.step()
    return engine, network


def test_each_step_of_opacus_is_on_the_ledger(path: Path) -> None:
    engine, _ = train(ledger_accountant(path, purpose="with Opacus", **SETTINGS))
    book = PrivacyLedger(path)
    (entry,) = book.entries
    assert (entry.step, entry.steps, entry.unit, entry.purpose) == (STEP, 8, "image", "with Opacus")
    assert engine.get_epsilon(1e-3) == book.epsilon(1e-3) == epsilon(SelfComposedDpEvent(STEP, 8), 1e-3)
    assert engine.accountant.history == [(2.0, 0.25, 8)]
    assert len(engine.accountant) == 8
    # The same training by Opacus's own account, which is looser.
    theirs = RDPAccountant()
    theirs.history = [(2.0, 0.25, 8)]
    assert theirs.get_epsilon(1e-3) >= engine.get_epsilon(1e-3)
    assumed = PrivacyReport.from_ledger(path).entries[0].assumptions
    assert any("Poisson" in text for text in assumed)
    assert any("one row" in text and "image" in text for text in assumed)


def test_a_step_is_on_the_ledger_before_the_weights_move_and_none_moves_past_the_budget(path: Path) -> None:
    budget = PrivacyBudget(1.0, 1e-3)
    room = affordable_steps(STEP, budget, at_most=100)
    assert 0 < room < 8
    network = nn.Linear(3, 2)
    before = network.weight.detach().clone()
    book = PrivacyLedger(path, budget=budget)
    with pytest.raises(PrivacyBudgetError, match="nothing was reserved"):
        train(ledger_accountant(book, **SETTINGS), network=network)
    assert torch.equal(network.weight, before)
    assert book.entries == ()
    seen = []
    accountant = LedgerAccountant(book, **(SETTINGS | {"planned_steps": room}))
    for _ in range(room):
        accountant.step(noise_multiplier=2.0, sample_rate=0.25)
        seen.append(book.entries[0].steps)
    assert seen == list(range(1, room + 1))
    with pytest.raises(PrivacyBudgetError, match="nothing was released"):
        accountant.step(noise_multiplier=2.0, sample_rate=0.25)
    assert book.epsilon(1e-3) <= 1.0


def test_several_trainings_share_one_ledger(path: Path) -> None:
    names = [ledger_accountant(path, **SETTINGS) for _ in range(2)]
    assert names[0] != names[1]
    engines = [train(name, epochs=1)[0] for name in names]
    assert [entry.steps for entry in PrivacyLedger(path).entries] == [4, 4]
    assert engines[0].get_epsilon(1e-3) == engines[1].get_epsilon(1e-3)
    assert engines[0].get_epsilon(1e-3) == epsilon(SelfComposedDpEvent(STEP, 8), 1e-3)


def test_a_change_of_noise_is_a_new_entry_with_what_is_left_of_the_plan(path: Path) -> None:
    book = PrivacyLedger(path, budget=PrivacyBudget(8.0, 1e-3))
    accountant = LedgerAccountant(book, **SETTINGS)
    for noise, count in ((2.0, 3), (3.0, 2)):
        for _ in range(count):
            accountant.step(noise_multiplier=noise, sample_rate=0.25)
    first, second = book.entries
    assert (first.steps, first.state, second.steps, second.state) == (3, "committed", 2, "reserved")
    assert (second.planned_steps, len(accountant)) == (9, 5)
    accountant.commit()
    assert book.entries[1].state == "committed"
    for _ in range(7):
        accountant = LedgerAccountant(book, **(SETTINGS | {"planned_steps": 1}))
        accountant.step(noise_multiplier=2.0, sample_rate=0.25)
        with pytest.raises(PrivacyBudgetError):
            accountant.step(noise_multiplier=5.0, sample_rate=0.25)


def test_a_checkpoint_continues_its_entry_and_never_shortens_it(path: Path) -> None:
    book = PrivacyLedger(path)
    accountant = LedgerAccountant(book, **SETTINGS)
    accountant.step(noise_multiplier=2.0, sample_rate=0.25)
    saved = accountant.state_dict()
    accountant.step(noise_multiplier=2.0, sample_rate=0.25)
    again = LedgerAccountant(book, **SETTINGS)
    again.load_state_dict(saved)
    again.step(noise_multiplier=2.0, sample_rate=0.25)
    (entry,) = book.entries
    assert entry.steps == 3
    book.commit(entry.entry_id)
    third = LedgerAccountant(book, **SETTINGS)
    third.load_state_dict(again.state_dict())
    third.step(noise_multiplier=2.0, sample_rate=0.25)
    assert book.entries[0].steps == 4
    with pytest.raises(LedgerError, match="belongs to another ledger"):
        LedgerAccountant(PrivacyLedger(path.with_name("other.jsonl")), **SETTINGS).load_state_dict(saved)


def test_bad_settings_are_refused_at_once(path: Path) -> None:
    for bad in ({"planned_steps": 0}, {"delta": 0.0}):
        name = ledger_accountant(path, **(SETTINGS | bad))
        with pytest.raises(ValueError, match=r"planned_steps|delta"):
            create_accountant(name)
    accountant = LedgerAccountant(PrivacyLedger(path), **(SETTINGS | {"unit": "hospital"}))
    with pytest.raises(ValueError, match="unit"):
        accountant.step(noise_multiplier=2.0, sample_rate=0.25)
    with pytest.raises(ValueError, match="noise_multiplier"):
        LedgerAccountant(PrivacyLedger(path), **SETTINGS).step(noise_multiplier=0.0, sample_rate=0.25)
    assert PrivacyLedger(path).entries == ()
