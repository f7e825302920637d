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

"""What MONAI users do around a trainer keeps its meaning around the private one."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import make_network, make_records, make_trainer, weights
from ignite.engine import Events
from ignite.handlers import EMAHandler
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.handlers import (
    ROCAUC,
    CheckpointLoader,
    CheckpointSaver,
    EarlyStopHandler,
    LrScheduleHandler,
    StatsHandler,
    TensorBoardStatsHandler,
    ValidationHandler,
    from_engine,
)
from monai.transforms import Activationsd, AsDiscreted, Compose, EnsureTyped

from monai_privacy import (
    DPSGDPlan,
    LedgerError,
    PrivacyAccountingHandler,
    PrivacyBudgetError,
    PrivacyLedger,
    PrivacyProgressHandler,
    PrivacyReportHandler,
)


def make_evaluator(network, *, records=None, **options) -> SupervisedEvaluator:
    if records is None:
        records = [record | {"patient_id": f"other-{record['patient_id']}"} for record in make_records(patients=6)]
    return SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Dataset(records, EnsureTyped("image")), batch_size=4),
        network=network,
        postprocessing=Compose([Activationsd("pred", softmax=True), AsDiscreted("label", to_onehot=2)]),
        key_val_metric={"auc": ROCAUC(output_transform=from_engine(["pred", "label"]))},
        **options,
    )


def plan_of(epochs: int, **numbers) -> DPSGDPlan:
    numbers = {"num_patients": 20, "expected_batch_size": 5, "delta": 1e-3, "noise_multiplier": 1.0} | numbers
    return DPSGDPlan.for_epochs(epochs=epochs, **numbers)


def test_validation_runs_each_epoch_and_is_on_the_record(tmp_path):
    network = make_network()
    evaluator = make_evaluator(network)
    trainer = make_trainer(tmp_path / "ledger", network=network, train_handlers=[ValidationHandler(1, evaluator)])
    seen = []
    evaluator.add_event_handler(Events.COMPLETED, lambda e: seen.append(e.state.metrics["auc"]))
    trainer.run()
    assert len(seen) == 2
    assert "validation patients" in trainer.ledger.entries[0].unnoised[0]


def test_validation_on_training_patients_is_refused(tmp_path):
    network = make_network()
    evaluator = make_evaluator(network, records=make_records(patients=6))
    with pytest.raises(ValueError, match="6 patients are both trained on and validated on"):
        make_trainer(tmp_path / "ledger", network=network, train_handlers=[ValidationHandler(1, evaluator)])


def test_loggers_show_epsilon_of_this_epoch_wherever_the_handler_stands(tmp_path):
    lines: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("monai.handlers.StatsHandler")
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    trainer = make_trainer(
        tmp_path / "ledger",
        train_handlers=[
            StatsHandler(output_transform=from_engine(["loss"], first=True)),
            StatsHandler(),
            TensorBoardStatsHandler(log_dir=str(tmp_path / "events"), output_transform=from_engine(["loss"], True)),
            PrivacyAccountingHandler(),
        ],
    )
    trainer.run()
    logger.removeHandler(listener)
    expected = [f"epsilon: {trainer.plan.epsilon(steps):.4f}" for steps in (4, 4, 8, 8)]
    assert [line.split("-- ")[1].strip() for line in lines] == expected
    assert trainer.state.metrics["epsilon"] == pytest.approx(trainer.ledger.epsilon(1e-3))
    assert any((tmp_path / "events").iterdir())


def test_epsilon_is_shown_for_an_epoch_that_the_plan_cut_short(tmp_path):
    plan = DPSGDPlan(num_patients=20, expected_batch_size=5, steps=6, delta=1e-3, noise_multiplier=1.0)
    trainer = make_trainer(tmp_path / "ledger", plan=plan, max_epochs=3, train_handlers=[PrivacyAccountingHandler()])
    trainer.run()
    assert trainer.state.metrics["epsilon"] == pytest.approx(plan.epsilon())


def test_learning_rate_schedules_count_epochs(tmp_path):
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    trainer = make_trainer(
        tmp_path / "ledger", network=network, optimizer=optimizer, train_handlers=[LrScheduleHandler(schedule, False)]
    )
    trainer.run()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_ema_follows_the_private_network(tmp_path):
    network = make_network()
    start = weights(network)
    handler = EMAHandler(network, momentum=0.5)
    trainer = make_trainer(tmp_path / "ledger", network=network)
    handler.attach(trainer)
    trainer.run()
    average = weights(handler.ema_model)
    assert not torch.equal(average, start)
    assert not torch.equal(average, weights(network))


def test_early_stopping_stops(tmp_path):
    stop = EarlyStopHandler(patience=1, score_function=lambda e: -e.state.epoch, epoch_level=True)
    trainer = make_trainer(tmp_path / "ledger", plan=plan_of(9), max_epochs=9, train_handlers=[stop])
    stop.set_trainer(trainer)
    trainer.run()
    assert trainer.state.epoch == 2
    assert trainer.ledger.entries[0].steps == 8


def checkpointed(folder: Path, ledger, *, epochs: int, resume: bool = False, **options):
    network = options.pop("network", None) or make_network()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    trainer = make_trainer(ledger, network=network, optimizer=optimizer, max_epochs=epochs, **options)
    state = {"trainer": trainer, "net": network, "opt": optimizer}
    if resume:
        latest = max(folder.glob("checkpoint_epoch=*.pt"), key=lambda path: int(path.stem.split("=")[1]))
        CheckpointLoader(str(latest), state).attach(trainer)
    CheckpointSaver(str(folder), state, save_interval=1).attach(trainer)
    return trainer


def test_a_resumed_run_continues_its_entry_and_charges_no_step_twice(tmp_path):
    ledger = tmp_path / "ledger"
    checkpointed(tmp_path, ledger, epochs=1, plan=plan_of(3)).run()
    resumed = checkpointed(tmp_path, ledger, epochs=3, plan=plan_of(3), resume=True)
    resumed.run()
    (entry,) = resumed.ledger.entries
    assert entry.steps == resumed.state.iteration == 12
    assert resumed.ledger_entry == entry.entry_id


def test_an_old_checkpoint_never_shortens_the_ledger(tmp_path):
    ledger = tmp_path / "ledger"
    checkpointed(tmp_path, ledger, epochs=2, plan=plan_of(3)).run()
    (tmp_path / "checkpoint_epoch=2.pt").unlink()
    resumed = checkpointed(tmp_path, ledger, epochs=3, plan=plan_of(3), resume=True)
    resumed.run()
    # Steps 5 to 8 were released twice, with other noise: both are charged, and the plan's 12 are never passed.
    assert resumed.ledger.entries[0].steps == 12
    assert resumed.state.iteration == 8


def test_checkpoints_load_as_plain_numbers_and_hold_no_random_state(tmp_path):
    checkpointed(tmp_path, tmp_path / "ledger", epochs=1).run()
    checkpoint = torch.load(tmp_path / "checkpoint_epoch=1.pt", weights_only=True)
    assert set(checkpoint["trainer"]) == {"epoch_length", "max_epochs", "iteration", "ledger_entry"}
    assert isinstance(checkpoint["trainer"]["ledger_entry"], str)


def test_a_checkpoint_of_another_ledger_is_refused(tmp_path):
    checkpointed(tmp_path, tmp_path / "ledger", epochs=1, plan=plan_of(2)).run()
    with pytest.raises(LedgerError, match="the checkpoint belongs to another ledger"):
        checkpointed(tmp_path, tmp_path / "other", epochs=2, plan=plan_of(2), resume=True).run()


def test_a_run_keeps_its_plan(tmp_path):
    checkpointed(tmp_path, tmp_path / "ledger", epochs=1, plan=plan_of(2)).run()
    trainer = checkpointed(tmp_path, tmp_path / "ledger", epochs=3, plan=plan_of(3), resume=True)
    with pytest.raises(ValueError, match="a run keeps its plan"):
        trainer.run()
    assert trainer.ledger.entries[0].state == "committed", "nothing was reserved for it"


def test_a_resumed_run_may_not_let_out_more_than_its_entry_says(tmp_path):
    checkpointed(tmp_path, tmp_path / "ledger", epochs=1, plan=plan_of(2)).run()
    for more in ({"insecure_seed": 5}, {"release_train_statistics": True}):
        with pytest.raises(ValueError, match="which does not have: "):
            checkpointed(tmp_path, tmp_path / "ledger", epochs=2, plan=plan_of(2), resume=True, **more).run()


def test_an_older_copy_of_the_ledger_is_noticed(tmp_path):
    checkpointed(tmp_path, tmp_path / "ledger", epochs=1, plan=plan_of(3)).run()
    copies = {name: (tmp_path / name).read_bytes() for name in ("ledger", "ledger.head")}
    checkpointed(tmp_path, tmp_path / "ledger", epochs=2, plan=plan_of(3), resume=True).run()
    (tmp_path / "ledger").write_bytes(copies["ledger"])
    with pytest.raises(LedgerError, match="or is an older copy"):
        checkpointed(tmp_path, tmp_path / "ledger", epochs=3, plan=plan_of(3), resume=True).run()
    # The whole folder put back: then the checkpoint knows of more steps than the ledger.
    (tmp_path / "ledger.head").write_bytes(copies["ledger.head"])
    with pytest.raises(LedgerError, match="it is an older copy"):
        checkpointed(tmp_path, tmp_path / "ledger", epochs=3, plan=plan_of(3), resume=True).run()


def test_a_checkpoint_of_an_ordinary_trainer_is_not_taken_for_a_private_one(tmp_path):
    from monai.engines import SupervisedTrainer

    network = make_network()
    loader = DataLoader(Dataset(make_records(patients=4), EnsureTyped("image")), batch_size=4)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    plain = SupervisedTrainer("cpu", 1, loader, network, optimizer, torch.nn.CrossEntropyLoss())
    CheckpointSaver(str(tmp_path), {"trainer": plain, "net": network, "opt": optimizer}, save_interval=1).attach(plain)
    plain.run()
    with pytest.raises(ValueError, match="ledger_entry"):
        checkpointed(tmp_path, tmp_path / "ledger", epochs=2, resume=True).run()


def test_a_finished_run_that_is_resumed_says_so(tmp_path):
    checkpointed(tmp_path, tmp_path / "ledger", epochs=2, plan=plan_of(2)).run()
    with pytest.raises(PrivacyBudgetError, match="all 8 planned steps: nothing was released"):
        checkpointed(tmp_path, tmp_path / "ledger", epochs=3, plan=plan_of(2), resume=True).run()


def test_the_last_epoch_of_a_stopped_run_is_validated_and_saved(tmp_path):
    network = make_network()
    evaluator = make_evaluator(network)
    plan = DPSGDPlan(num_patients=20, expected_batch_size=5, steps=6, delta=1e-3, noise_multiplier=1.0)
    trainer = checkpointed(
        tmp_path, tmp_path / "ledger", epochs=5, plan=plan, network=network,
        train_handlers=[ValidationHandler(1, evaluator), PrivacyReportHandler(str(tmp_path))],
    )  # fmt: skip
    trainer.run()
    assert evaluator.state.epoch == 2
    saved = torch.load(tmp_path / "checkpoint_epoch=2.pt", weights_only=True)
    assert torch.equal(saved["net"]["0.weight"], network[0].weight)
    assert (tmp_path / "privacy_report.json").is_file()
    assert "6 of 6 planned" in (tmp_path / "privacy_report.md").read_text(encoding="utf-8")


def test_progress_tells_epoch_and_epsilon_and_no_loss(tmp_path, capsys):
    make_trainer(tmp_path / "ledger", train_handlers=[PrivacyProgressHandler()]).run()
    shown = capsys.readouterr().err
    assert "epoch 1/2" in shown
    assert "ε" in shown
    assert "loss" not in shown


def test_progress_bar_on_a_terminal(tmp_path):
    import io

    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    make_trainer(tmp_path / "ledger", train_handlers=[PrivacyProgressHandler(console=console)]).run()
    assert "8/8" in out.getvalue()
    assert "left" in out.getvalue()


@pytest.mark.parametrize("handler", [PrivacyAccountingHandler(), PrivacyReportHandler("folder")])
def test_handlers_say_where_they_belong(handler):
    with pytest.raises(ValueError, match="Attach it to a DPSupervisedTrainer"):
        handler.attach(make_evaluator(make_network()))


KILLED = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_engines_with_monai import checkpointed, plan_of
    from ignite.engine import Events
    folder = Path(sys.argv[1])
    trainer = checkpointed(folder, folder / "ledger", epochs=200, plan=plan_of(200), resume=len(sys.argv) > 2)
    # Printed only once the step is in the weights, so that each line is a release that happened.
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: print("released", flush=True))
    trainer.run()
"""


@pytest.mark.slow(seconds=30)
def test_kill_nine_in_the_middle_then_resume_never_under_counts(tmp_path):
    script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent))
    released = 0
    for attempt, lines in enumerate((9, 14, 6)):
        arguments = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path), *(["resume"] if attempt else [])]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            for _ in range(lines):
                assert process.stdout.readline() == "released\n"
            os.kill(process.pid, signal.SIGKILL)
            released += lines + len(process.stdout.readlines())
        ledger = PrivacyLedger(tmp_path / "ledger")
        (entry,) = ledger.entries
        # At most one step, recorded when the process died, was not released.
        assert released <= entry.steps <= released + attempt + 1
        assert ledger.epsilon(1e-3) >= plan_of(200).epsilon(steps=released)
    # Restarted from a checkpoint each time, the weights have seen fewer steps than the ledger has.
    finished = checkpointed(tmp_path, tmp_path / "ledger", epochs=20, plan=plan_of(200), resume=True)
    finished.run()
    assert finished.ledger.entries[0].steps > finished.state.iteration
