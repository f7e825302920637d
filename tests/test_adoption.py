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
"""A trainer that Python code has made becomes a private one, with its handlers."""

from __future__ import annotations

import pytest
import torch
from conftest import make_network, make_records
from ignite.engine import Events
from ignite.metrics import Accuracy
from monai.bundle import PythonicWorkflow
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import CheckpointSaver, LrScheduleHandler, StatsHandler, ValidationHandler, from_engine

from monai_privacy import DPSGDPlan, DPSupervisedTrainer, PrivacyLedger, private_trainer

PLAN = DPSGDPlan(num_patients=20, expected_batch_size=5, steps=8, delta=1e-3, noise_multiplier=1.5)


def ordinary(folder, *, handlers=(), network=None, **arguments) -> SupervisedTrainer:
    network = network or make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(
            Dataset([{**r, "patient_id": f"other {i}"} for i, r in enumerate(make_records(patients=20))]),
            batch_size=4,
        ),
        network=network,
    )
    own = [
        ValidationHandler(interval=1, validator=evaluator),
        LrScheduleHandler(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), print_lr=False),
        CheckpointSaver(str(folder), {"model": network}, save_final=True, final_filename="model.pt"),
        StatsHandler(output_transform=lambda output: None),
        *handlers,
    ]
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        train_data_loader=DataLoader(Dataset(make_records(patients=20)), batch_size=4, shuffle=True),
        network=network,
        optimizer=optimizer,
        loss_function=torch.nn.CrossEntropyLoss(),
        train_handlers=own,
        key_train_metric={"accuracy": Accuracy(output_transform=from_engine(["pred", "label"]))},
        **arguments,
    )


def test_everything_comes_along_and_the_run_is_private(tmp_path):
    trainer = ordinary(tmp_path)
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl")
    private = private_trainer(trainer, plan=PLAN, ledger=ledger, purpose="adopted")
    assert isinstance(private, DPSupervisedTrainer)
    private.run()
    (entry,) = ledger.entries
    assert (entry.state, entry.steps, entry.purpose) == ("committed", 8, "adopted")
    assert any("validation" in text for text in entry.unnoised)
    assert (tmp_path / "model.pt").is_file()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    assert "accuracy" not in private.state.metrics
    assert trainer.state.iteration == 0


def test_a_python_workflow_trains_privately(tmp_path):
    class Training(PythonicWorkflow):
        def initialize(self):
            super().initialize()
            self.made = private_trainer(ordinary(tmp_path), plan=PLAN, ledger=PrivacyLedger(tmp_path / "ledger.jsonl"))

        def run(self):
            self.made.run()

        def finalize(self):
            pass

    (tmp_path / "metadata.json").write_text("{}", encoding="utf-8")
    workflow = Training(workflow_type="train", meta_file=str(tmp_path / "metadata.json"))
    workflow.initialize()
    workflow.run()
    assert PrivacyLedger(tmp_path / "ledger.jsonl").entries[0].steps == 8


class OwnTrainer(SupervisedTrainer):
    """With steps of its own, perhaps."""


def refused(tmp_path, trainer, reason):
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl")
    with pytest.raises(ValueError, match=reason):
        private_trainer(trainer, plan=PLAN, ledger=ledger)
    assert not ledger.entries


def test_what_would_be_lost_is_refused(tmp_path):
    refused(tmp_path, ordinary(tmp_path, iteration_update=lambda engine, batch: {}), "iteration_update")
    refused(tmp_path, ordinary(tmp_path, accumulation_steps=2), "accumulation_steps")
    trainer = ordinary(tmp_path)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: None)
    refused(tmp_path, trainer, "as event handler")
    trainer = ordinary(tmp_path)
    CheckpointSaver(str(tmp_path), {"trainer": trainer}, save_final=True).attach(trainer)
    refused(tmp_path, trainer, "holds the trainer itself")
    trainer = ordinary(tmp_path)
    trainer.run()
    refused(tmp_path, trainer, "steps without privacy")
    trainer = ordinary(tmp_path)
    trainer.__class__ = OwnTrainer
    refused(tmp_path, trainer, "OwnTrainer")
