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

"""The progress bar: no ε below the truth without saying of when it is, none rounded down, no loss."""

from __future__ import annotations

import io
import re

import pytest
from conftest import make_trainer
from ignite.engine import Events
from rich.console import Console

from monai_privacy import DPSGDPlan, PrivacyProgressHandler
from monai_privacy.engines import DPSupervisedTrainer

# ε is 2.5081 after the first epoch, 3.4308 after the second.
PLAN = DPSGDPlan.for_epochs(num_patients=20, expected_batch_size=5, epochs=2, delta=1e-3, noise_multiplier=1.0)


def console_of(*, terminal: bool, width: int = 80) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=width), out


def frames(out: io.StringIO) -> list[str]:
    """What stood on the terminal, one after another."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()))


def trained(tmp_path, handler: PrivacyProgressHandler, **options: object) -> dict[int, float]:
    """Train with the handler; ε by epoch, as the ledger has it."""
    found = {}

    def note(engine: DPSupervisedTrainer) -> None:
        found[engine.state.epoch] = engine.ledger.epsilon(engine.plan.delta)

    trainer = make_trainer(tmp_path / "ledger", train_handlers=[handler], plan=PLAN, **options)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, note)
    trainer.run()
    return found


def test_the_bar_says_of_which_epoch_its_epsilon_is(tmp_path):
    console, out = console_of(terminal=True)
    trained(tmp_path, PrivacyProgressHandler("with privacy", console))
    running = [frame for frame in frames(out) if "epoch 2/2" in frame and "ε" in frame]
    assert running
    # While the second epoch runs, its steps are on the ledger already.
    assert all(re.search(r"ε \d+\.\d\d after epoch [12]( |$)", frame) for frame in running)
    assert "after epoch 2" in running[-1]
    assert "8/8" in running[-1]  # not cut off in a common terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_no_epsilon_is_rounded_down(tmp_path, terminal):
    console, out = console_of(terminal=terminal)
    truth = trained(tmp_path, PrivacyProgressHandler(console=console))
    shown = {float(value) for value in re.findall(r"ε (\d+\.\d\d)", out.getvalue())}
    assert len(shown) == 2
    assert all(epsilon <= told < epsilon + 0.01 for epsilon, told in zip(truth.values(), sorted(shown), strict=True))
    assert any(round(epsilon, 2) < epsilon for epsilon in truth.values())  # else the test could not fail


def test_a_run_without_guarantee_shows_no_number(tmp_path):
    console, out = console_of(terminal=False)
    trained(tmp_path, PrivacyProgressHandler(console=console), insecure_seed=1)
    assert "ε inf" in out.getvalue()
