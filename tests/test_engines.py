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

"""The private step inside MONAI's trainer: bounded, noised, recorded first, and otherwise as MONAI users know it."""

from __future__ import annotations

import hashlib
import itertools
import logging

import pytest
import torch
from conftest import make_network, make_records, make_trainer, weights
from ignite.engine import Events
from monai.data import DataLoader, Dataset, pad_list_data_collate
from monai.engines.utils import IterationEvents, PrepareBatchExtraInput
from monai.transforms import Compose, EnsureTyped, RandGaussianNoised, RandSpatialCropSamplesd
from monai.utils import set_determinism
from scipy import stats
from torch import nn

from monai_privacy import DPSGDPlan, LedgerError, PrivacyBudget, PrivacyBudgetError, PrivacyLedger
from monai_privacy.provenance import code_digest, network_digest

FALSE_ALARM = 1e-7


def everybody(patients: int, steps: int = 1, **numbers) -> DPSGDPlan:
    """A plan that draws every patient in each step, almost without noise: what is left is the clipped sum."""
    numbers = {"noise_multiplier": 1e-9, "delta": 1e-3, "max_grad_norm": 0.01} | numbers
    return DPSGDPlan(num_patients=patients, expected_batch_size=patients, steps=steps, **numbers)


def update(ledger, **options) -> torch.Tensor:
    """What one step of plain SGD at rate 1 takes off the weights: the released mean gradient."""
    network = options.pop("network", None) or make_network()
    before = weights(network)
    make_trainer(ledger, network=network, learning_rate=1.0, max_epochs=1, **options).run()
    return before - weights(network)


def test_removing_a_patient_moves_the_step_by_at_most_the_bound(tmp_path):
    records = make_records(patients=6, images=3)
    for number in range(3):
        records[number]["image"] = records[number]["image"] * 1e4
    plan = everybody(6)
    whole = update(tmp_path / "one", records=records, plan=plan) * plan.expected_batch_size
    without = update(tmp_path / "two", records=records[3:], plan=plan) * plan.expected_batch_size
    assert float((whole - without).norm()) <= 0.01 * (1 + 1e-4)
    assert float((whole - without).norm()) > 0.005


def test_divides_by_the_expected_batch_size_whatever_was_drawn(tmp_path):
    records = make_records(patients=6)
    six, three = everybody(6), everybody(6)
    full = update(tmp_path / "one", records=records, plan=six)
    half = update(tmp_path / "two", records=records[:6], plan=three)
    single = update(tmp_path / "three", records=records[:6], plan=everybody(3))
    torch.testing.assert_close(half * 2, single, rtol=1e-3, atol=1e-6)
    assert float(full.norm()) > 0


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_microbatches_do_not_change_the_step(tmp_path, spatial_dims):
    records = make_records(patients=4, images=3, spatial_dims=spatial_dims)
    steps = [
        update(
            tmp_path / str(size),
            records=records,
            plan=everybody(4),
            network=make_network(spatial_dims),
            max_physical_batch_size=size,
        )
        for size in (1, 2, None)
    ]
    torch.testing.assert_close(steps[0], steps[2], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(steps[1], steps[2], rtol=1e-4, atol=1e-7)


def test_a_patient_with_more_copies_of_an_image_counts_no_more(tmp_path):
    records = make_records(patients=4, images=1)
    once = update(tmp_path / "one", records=records, plan=everybody(4, max_grad_norm=1e6, noise_multiplier=1e-15))
    thrice = update(
        tmp_path / "two",
        records=[*records, records[0], records[0]],
        plan=everybody(4, max_grad_norm=1e6, noise_multiplier=1e-15),
    )
    torch.testing.assert_close(once, thrice, rtol=1e-4, atol=1e-7)


def test_four_crops_cost_one_bound(tmp_path):
    crops = Compose([EnsureTyped("image"), RandSpatialCropSamplesd("image", 8, num_samples=4, random_size=False)])
    moved = update(tmp_path / "ledger", records=make_records(patients=1), plan=everybody(1), transform=crops)
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_patient_that_is_not_finite_is_left_out(tmp_path):
    records = make_records(patients=3)
    records[0]["image"] = records[0]["image"] * float("nan")
    found = update(tmp_path / "one", records=records, plan=everybody(3))
    expected = update(tmp_path / "two", records=records[2:], plan=everybody(3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


class NoGradient(nn.Module):
    """Many parameters, none of which the output depends on: what moves them is noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(30_000))

    def forward(self, inputs):
        return inputs.flatten(1)[:, :2] + 0 * self.weight.sum()


@pytest.mark.parametrize("expected_batch_size", [5, 20])
def test_noise_has_standard_deviation_sigma_c_and_the_same_test_fails_at_two_thirds(tmp_path, expected_batch_size):
    plan = DPSGDPlan(
        num_patients=20, expected_batch_size=expected_batch_size, steps=1, delta=1e-3, max_grad_norm=3.0,
        noise_multiplier=1.5,
    )  # fmt: skip
    noise = update(tmp_path / "ledger", network=NoGradient(), plan=plan, epoch_length=1).double()

    def p_value(sigma: float) -> float:
        statistic = float((noise * expected_batch_size / (sigma * 3.0)).square().sum())
        return 2 * min(stats.chi2.cdf(statistic, noise.numel()), stats.chi2.sf(statistic, noise.numel()))

    assert p_value(1.5) > FALSE_ALARM
    assert p_value(1.0) < FALSE_ALARM
    assert p_value(1.5 * 1.05) < FALSE_ALARM


def test_noise_differs_from_step_to_step_and_parameters_without_gradient_get_it(tmp_path):
    network = NoGradient()
    seen = [weights(network)]
    trainer = make_trainer(tmp_path / "ledger", network=network)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(weights(network)))
    trainer.run()
    steps = [later - earlier for earlier, later in itertools.pairwise(seen)]
    assert len(steps) == 8
    for first, second in itertools.pairwise(steps):
        assert stats.pearsonr(first.numpy(), second.numpy()).pvalue > FALSE_ALARM


def test_set_determinism_fixes_neither_draw_nor_noise(tmp_path):
    def run(name: str) -> torch.Tensor:
        set_determinism(seed=123)
        network = make_network()
        drawn = []
        trainer = make_trainer(tmp_path / name, network=network)
        trainer.add_event_handler(
            Events.GET_BATCH_COMPLETED,
            lambda engine: drawn.append(sum(len(p.patient_index) for p in engine.state.batch.parts)),
        )
        trainer.run()
        return torch.cat([weights(network), torch.tensor(drawn, dtype=torch.float32)])

    try:
        first, second = run("one"), run("two")
    finally:
        set_determinism(seed=None)
    assert not torch.equal(first[-8:], second[-8:])
    assert not torch.equal(first[:-8], second[:-8])


def test_an_insecure_seed_repeats_the_run_and_forfeits_the_guarantee(tmp_path, caplog):
    def run(name: str) -> torch.Tensor:
        network = make_network()
        make_trainer(tmp_path / name, network=network, insecure_seed=3).run()
        return weights(network)

    assert torch.equal(run("one"), run("two"))
    ledger = PrivacyLedger(tmp_path / "one")
    assert ledger.epsilon(1e-3) == float("inf")
    assert "insecure_seed" in ledger.entries[0].not_private[0]


class CountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = make_network()
        self.sizes: list[int] = []

    def forward(self, inputs):
        self.sizes.append(len(inputs))
        return self.body(inputs)


def test_an_empty_draw_is_noised_and_recorded_and_never_calls_the_network(tmp_path):
    network = CountsCalls()
    plan = DPSGDPlan(num_patients=10**6, expected_batch_size=1, steps=30, delta=1e-7, noise_multiplier=1.0)
    before = weights(network)
    trainer = make_trainer(tmp_path / "ledger", network=network, plan=plan, max_epochs=1, epoch_length=30)
    moved = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: moved.append(weights(network)))
    trainer.run()
    assert trainer.ledger.entries[0].steps == 30
    assert 0 not in network.sizes
    steps = [float((b - a).norm()) for a, b in zip([before, *moved], moved, strict=False)]
    assert min(steps) > 0


def test_the_step_is_recorded_before_it_is_released(tmp_path, monkeypatch):
    network = make_network()
    trainer = make_trainer(tmp_path / "ledger", network=network)
    before = weights(network)
    noised = []
    monkeypatch.setattr(trainer._noise, "add_gaussian", lambda *args: noised.append(args), raising=False)
    monkeypatch.setattr(
        trainer.ledger, "record_step", lambda entry: (_ for _ in ()).throw(LedgerError("the disk is full"))
    )
    with pytest.raises(LedgerError, match="the disk is full"):
        trainer.run()
    assert not noised
    assert torch.equal(weights(network), before)
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())


def test_one_iteration_is_one_ledger_line_and_fires_each_event_once(tmp_path):
    trainer = make_trainer(tmp_path / "ledger", max_physical_batch_size=1)
    counts: dict[str, int] = {}

    def count(name: str) -> None:
        counts[name] = counts.get(name, 0) + 1

    for event in (*IterationEvents, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED, Events.COMPLETED):
        if event not in (IterationEvents.INNER_ITERATION_STARTED, IterationEvents.INNER_ITERATION_COMPLETED):
            trainer.add_event_handler(event, count, event.name)
    trainer.run()
    steps = 8
    assert trainer.ledger.entries[0].steps == trainer.state.iteration == steps
    assert counts.pop("EPOCH_COMPLETED") == 2
    assert counts.pop("COMPLETED") == 1
    assert set(counts.values()) == {steps}


def test_the_users_handlers_see_the_noised_gradient_only(tmp_path):
    trainer = make_trainer(tmp_path / "ledger", network=NoGradient())
    seen = []
    trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, lambda e: seen.append(e.network.weight.grad))
    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, lambda e: seen.append(e.network.weight.grad.clone()))
    trainer.run()
    assert seen[0] is None or not seen[0].any()
    assert seen[1].all()


def test_a_run_stopped_by_its_budget_ends_below_it_with_its_epoch_completed(tmp_path, caplog):
    plan = DPSGDPlan.for_epochs(num_patients=20, expected_batch_size=5, epochs=10, delta=1e-3, noise_multiplier=1.0)
    budget = PrivacyBudget(epsilon=plan.epsilon(steps=7) * 1.0001, delta=1e-3)
    ledger = PrivacyLedger(tmp_path / "ledger", budget=budget)
    trainer = make_trainer(ledger, plan=plan, max_epochs=10, fewest_steps=1)
    fired = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: fired.append((e.state.epoch, e.state.iteration)))
    trainer.add_event_handler(Events.COMPLETED, lambda e: fired.append("completed"))
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert fired == [(1, 4), (2, 7), "completed"]
    assert ledger.entries[0].steps == 7
    assert ledger.epsilon(1e-3) <= budget.epsilon
    assert "Stopped after epoch 2 of 10" in caplog.text


def test_a_run_stops_at_its_planned_steps(tmp_path):
    plan = DPSGDPlan(num_patients=20, expected_batch_size=5, steps=6, delta=1e-3, noise_multiplier=1.0)
    trainer = make_trainer(tmp_path / "ledger", plan=plan, max_epochs=10)
    trainer.run()
    assert trainer.ledger.entries[0].steps == trainer.state.iteration == 6


def test_a_calibrated_run_ends_at_most_at_its_target(tmp_path):
    plan = DPSGDPlan.for_epochs(num_patients=20, expected_batch_size=5, epochs=2, delta=1e-3).calibrate(epsilon=4.0)
    trainer = make_trainer(tmp_path / "ledger", plan=plan)
    trainer.run()
    assert 4.0 * (1 - 2e-3) <= trainer.ledger.epsilon(1e-3) <= 4.0


def test_running_again_releases_nothing(tmp_path):
    network = make_network()
    trainer = make_trainer(tmp_path / "ledger", network=network)
    trainer.run()
    after = weights(network)
    with pytest.raises(PrivacyBudgetError, match="all 8 planned steps: nothing was released"):
        trainer.run()
    assert torch.equal(weights(network), after)
    assert trainer.ledger.entries[0].steps == 8


def test_a_run_that_ends_is_committed_and_one_that_crashes_keeps_its_reservation(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger", budget=PrivacyBudget(8.0, 1e-3))
    plan = DPSGDPlan(num_patients=20, expected_batch_size=5, steps=12, delta=1e-3, noise_multiplier=2.0)
    network = make_network()
    config = tmp_path / "train.yaml"
    config.write_text("lr: 0.1")
    done = make_trainer(
        ledger, network=network, plan=plan, max_epochs=2, purpose="first try", config_files=[config], epoch_length=4
    )
    done.run()
    (entry,) = ledger.entries
    assert (entry.state, entry.steps, entry.granted, entry.purpose) == ("committed", 8, 8, "first try")
    assert entry.artifacts == {
        "code": code_digest(),
        "config train.yaml": hashlib.sha256(b"lr: 0.1").hexdigest(),
        "model": network_digest(network),
    }
    # Going on takes the steps that are left of the plan, and only those.
    done.state.max_epochs = 3
    done.run()
    assert (ledger.entries[0].state, ledger.entries[0].steps) == ("committed", 12)

    def stop(engine):
        raise KeyboardInterrupt

    crashed = make_trainer(ledger, plan=plan, max_epochs=2, epoch_length=4)
    crashed.add_event_handler(Events.ITERATION_COMPLETED(once=3), stop)
    with pytest.raises(KeyboardInterrupt):
        crashed.run()
    entry = ledger.entries[1]
    assert (entry.state, entry.steps, entry.granted) == ("reserved", 3, 12)


def test_two_networks_that_differ_in_a_bit_have_two_digests():
    network = make_network()
    first = network_digest(network)
    assert network_digest(make_network()) == first
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0].nextafter_(torch.tensor(9.0))
    assert network_digest(network) != first
    assert network_digest(make_network().double()) != first


def test_a_config_file_that_is_not_there_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"config file .*none.yaml cannot be read"):
        make_trainer(tmp_path / "ledger", config_files=[tmp_path / "none.yaml"])


def test_a_run_on_patients_of_another_cohort_is_refused(tmp_path):
    ids = [record["patient_id"] for record in make_records(patients=20, images=1)]
    for known, refused in ((ids, False), (ids[1:], True)):
        ledger = PrivacyLedger.register(
            tmp_path / f"{refused}.jsonl", cohort="Lungs", budget=PrivacyBudget(8.0, 1e-3), ids=known
        )
        plan = DPSGDPlan(num_patients=20, expected_batch_size=5, steps=8, delta=1e-3, noise_multiplier=2.0)
        network = make_network()
        before = weights(network)
        trainer = make_trainer(ledger, network=network, plan=plan)
        if refused:
            with pytest.raises(ValueError, match="1 of 20 patients are not in the cohort 'Lungs'"):
                trainer.run()
            assert ledger.entries == ()
            assert torch.equal(weights(network), before)
            assert trainer.state.iteration == 0, "refused before the engine starts"
        else:
            trainer.run()
            assert ledger.entries[0].members == "checked"


def test_a_run_on_a_part_of_a_cohort_is_charged_to_that_part(tmp_path):
    records = make_records(patients=40, images=1)
    ids = [record["patient_id"] for record in records]
    ledger = PrivacyLedger.register(
        tmp_path / "ledger", cohort="Lungs", budget=PrivacyBudget(8.0, 1e-3), ids=ids, partitions=2
    )
    own = set(ledger.partition_ids(ids, 1))
    part = [record for record in records if record["patient_id"] in own]
    plan = DPSGDPlan(num_patients=20, expected_batch_size=5, steps=8, delta=1e-3, noise_multiplier=2.0)
    make_trainer(ledger, records=part, plan=plan, partition=1).run()
    assert ledger.entries[0].partition == 1
    with pytest.raises(ValueError, match="belong to other parts"):
        make_trainer(ledger, records=part, plan=plan, partition=0).run()


def test_a_budget_for_fewer_steps_is_told_before_training(tmp_path, caplog):
    plan = DPSGDPlan(num_patients=20, expected_batch_size=5, steps=40, delta=1e-3, noise_multiplier=1.0)
    ledger = PrivacyLedger(tmp_path / "ledger", budget=PrivacyBudget(plan.epsilon(10), 1e-3))
    with pytest.raises(PrivacyBudgetError, match="has room for 10 of 40 steps"):
        make_trainer(ledger, plan=plan, max_epochs=10).run()
    assert ledger.entries == (), "a plan that does not fit whole is refused"
    trainer = make_trainer(ledger, plan=plan, max_epochs=10, fewest_steps=5)
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "has room for 10 of the plan's 40 steps" in caplog.text
    assert ledger.entries[0].steps == ledger.entries[0].granted == 10


def test_a_refused_run_does_not_start_the_engine(tmp_path):
    """On an exception inside it, ``CheckpointSaver(save_final=True)`` writes the untrained network over a model."""
    fired = []
    plan = everybody(20, steps=2, noise_multiplier=1.0)
    ledger = PrivacyLedger(tmp_path / "ledger", budget=PrivacyBudget(plan.epsilon() * 1.001, 1e-3))
    for refusals in (0, 1, 2):
        trainer = make_trainer(ledger, plan=plan, max_epochs=2)
        for event in (Events.STARTED, Events.EXCEPTION_RAISED, Events.COMPLETED):
            trainer.add_event_handler(event, lambda e, event=event: fired.append(event))
        if not refusals:
            trainer.run()
            fired.clear()
        with pytest.raises(PrivacyBudgetError):
            trainer.run()
    assert not fired
    assert len(ledger.entries) == 1


def test_a_refused_run_is_refused_each_time(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger", budget=PrivacyBudget(0.01, 1e-3))
    trainer = make_trainer(ledger)
    for _ in range(3):
        with pytest.raises(PrivacyBudgetError, match="is spent"):
            trainer.run()


def test_a_second_run_on_a_spent_ledger_is_refused(tmp_path):
    plan = everybody(20, steps=2, noise_multiplier=1.0)
    ledger = PrivacyLedger(tmp_path / "ledger", budget=PrivacyBudget(plan.epsilon() * 1.001, 1e-3))
    make_trainer(ledger, plan=plan, max_epochs=2).run()
    with pytest.raises(PrivacyBudgetError, match="is spent"):
        make_trainer(ledger, plan=plan, max_epochs=2).run()


def test_training_statistics_are_off_unless_asked_for(tmp_path):
    from monai.handlers import ROCAUC, from_engine

    metric = ROCAUC(output_transform=from_engine(["pred", "label"]))
    trainer = make_trainer(tmp_path / "ledger", key_train_metric={"auc": metric})
    outputs = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(e.state.output))
    trainer.run()
    assert all(output == [{}] for output in outputs)
    assert from_engine(["loss"], first=True)(outputs[0]) is None
    assert trainer.state.metrics == {}
    assert trainer.ledger.entries[0].unnoised == ()


def test_training_statistics_asked_for_are_right_and_on_the_record(tmp_path):
    from monai.handlers import ROCAUC, from_engine
    from monai.transforms import Activationsd, AsDiscreted

    trainer = make_trainer(
        tmp_path / "ledger",
        plan=everybody(20, steps=2),
        release_train_statistics=True,
        postprocessing=Compose([Activationsd("pred", softmax=True), AsDiscreted("label", to_onehot=2)]),
        key_train_metric={"auc": ROCAUC(output_transform=from_engine(["pred", "label"]))},
    )
    losses = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: losses.append(from_engine(["loss"], first=True)(e.state.output))
    )
    network = make_network()
    records = make_records(patients=20)
    images, labels = torch.stack([r["image"] for r in records]), torch.tensor([r["label"] for r in records])
    trainer.run()
    with torch.no_grad():
        expected = nn.functional.cross_entropy(network(images), labels)
    assert float(losses[0]) == pytest.approx(float(expected), rel=1e-4)
    assert 0 <= trainer.state.metrics["auc"] <= 1
    assert "training images, loss" in trainer.ledger.entries[0].unnoised[0]


def test_automatic_mixed_precision_is_bf16_without_a_scaler(tmp_path):
    seen = []

    class Watch(nn.Sequential):
        def forward(self, inputs):
            outputs = super().forward(inputs)
            seen.append(outputs.dtype)
            return outputs

    trainer = make_trainer(tmp_path / "ledger", network=Watch(*make_network()), amp=True)
    trainer.run()
    assert set(seen) == {torch.bfloat16}
    assert trainer.scaler is None


def test_other_arguments_of_the_network_follow_their_rows(tmp_path):
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_network()

        def forward(self, inputs, age):
            assert len(age) == len(inputs)
            assert torch.equal(age, inputs.mean(dim=(1, 2, 3))) or not age.any() or len(set(age.tolist())) == 1
            return self.body(inputs)

    def prepare(batch, device=None, non_blocking=False, **kwargs):
        return batch["image"], batch["label"], (), {"age": batch["image"].mean(dim=(1, 2, 3))}

    trainer = make_trainer(tmp_path / "ledger", network=TwoInputs(), prepare_batch=prepare)
    trainer.run()
    assert trainer.state.iteration == 8


class MixesAges(nn.Module):
    """Moves each row where all rows together are old: a probe that does not vary the ages sees nothing."""

    def __init__(self):
        super().__init__()
        self.body = make_network()

    def forward(self, inputs, age):
        ramp = torch.linspace(-1, 1, inputs.shape[-1])
        return self.body(inputs + (age.sum() > 50) * 10 * ramp)


WITH_AGE = PrepareBatchExtraInput(extra_keys={"age": "age"})


def test_rows_with_further_arguments_go_one_patient_at_a_time(tmp_path):
    records = [record | {"age": torch.tensor(9.0)} for record in make_records(patients=6, images=1)]
    options = {"plan": everybody(6), "prepare_batch": WITH_AGE, "batch_size": 6}
    whole = update(tmp_path / "one", records=records, network=MixesAges(), **options) * 6
    without = update(tmp_path / "two", records=records[1:], network=MixesAges(), **options) * 6
    assert float((whole - without).norm()) <= 0.01 * (1 + 1e-4)


@pytest.mark.parametrize("method", ["one_pass", "opacus"])
def test_rows_with_further_arguments_are_refused_where_a_method_is_forced(tmp_path, method):
    records = [record | {"age": torch.tensor(9.0)} for record in make_records(patients=20)]
    options = {"network": MixesAges(), "prepare_batch": WITH_AGE, "clipping_method": method}
    trainer = make_trainer(tmp_path / "ledger", records=records, **options)
    with pytest.raises(ValueError, match="further inputs"):
        trainer.run()


def test_a_prepare_batch_that_mixes_rows_gets_one_patient_at_a_time(tmp_path):
    def mix(batch, device=None, non_blocking=False, **kwargs):
        images = batch["image"]
        return images - images.mean(0) * len(images), batch["label"]

    records = make_records(patients=6, images=1)
    whole = update(tmp_path / "one", records=records, plan=everybody(6), prepare_batch=mix) * 6
    without = update(tmp_path / "two", records=records[1:], plan=everybody(6), prepare_batch=mix) * 6
    assert float((whole - without).norm()) <= 0.01 * (1 + 1e-4)


def test_a_collation_that_pads_to_the_largest_image_costs_one_bound(tmp_path):
    """S-type trap: pad_list_data_collate lets one patient change the rows of every other."""

    class AnySize(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs).mean(dim=(2, 3))

    def network() -> nn.Module:
        torch.manual_seed(0)
        return AnySize(nn.Conv2d(1, 2, 3, padding=1))

    records = [*make_records(patients=5, images=1), *make_records(patients=1, images=1, side=16)]
    records[-1]["patient_id"] = "large"

    def step(name: str, chosen: list[dict]) -> torch.Tensor:
        data = Dataset(chosen, EnsureTyped("image"))
        loader = DataLoader(data, batch_size=2, collate_fn=pad_list_data_collate)
        return update(tmp_path / name, plan=everybody(6), network=network(), train_data_loader=loader) * 6

    moved = step("one", records) - step("two", records[:-1])
    assert 0 < float(moved.norm()) <= 0.01 * (1 + 1e-4)


def test_refuses_a_loss_that_keeps_what_it_saw(tmp_path):
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, outputs, targets):
            self.seen += outputs.detach().mean()
            return nn.functional.cross_entropy(outputs, targets) + 0 * self.seen

    with pytest.raises(ValueError, match="updates seen in its forward pass"):
        make_trainer(tmp_path / "ledger", loss_function=Remembers(), plan=everybody(20)).run()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", ["dropout", "augmentation"])
def test_a_fixed_seed_does_not_couple_patients_through_their_random_numbers(tmp_path, what, workers):
    """Who is drawn first must not decide the dropout mask or the augmentation of those who come after."""
    records = make_records(patients=12, images=1)

    def steps(name: str, chosen: list[dict]) -> torch.Tensor:
        set_determinism(seed=0)
        network = make_network()
        if what == "dropout":
            network.insert(3, nn.Dropout(0.5))
        transform = Compose(
            [EnsureTyped("image"), *([RandGaussianNoised("image", 1.0, std=1.0)] * (what != "dropout"))]
        )
        loader = DataLoader(Dataset(chosen, transform), batch_size=2, num_workers=workers)
        return update(tmp_path / name, plan=everybody(12), network=network, train_data_loader=loader)

    try:
        # The first patient is left out: under a shared stream, all others would get other masks, and the two runs
        # would agree wherever they have the same patients in the same places.
        first, second = steps("one", records), steps("two", records)
    finally:
        set_determinism(seed=None)
    # Secret randomness: the same data under the same public seed do not repeat.
    assert float((first - second).norm()) > 1e-4


def test_the_users_random_state_goes_on_as_if_nothing_had_been_drawn(tmp_path):
    network = make_network()
    network.insert(3, nn.Dropout(0.5))
    trainer = make_trainer(tmp_path / "ledger", network=network)
    seen = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(torch.get_rng_state()))
    trainer.run()
    assert all(torch.equal(state, seen[0]) for state in seen[:4])


def test_the_batch_is_not_shown_to_handlers(tmp_path):
    trainer = make_trainer(tmp_path / "ledger")
    batches = []
    trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, lambda e: batches.append(e.state.batch))
    trainer.run()
    assert batches
    assert all(batch == [{}] for batch in batches)


def test_records_that_change_after_the_trainer_was_made_are_refused(tmp_path):
    records = make_records(patients=20)
    trainer = make_trainer(tmp_path / "ledger", records=records)
    records.reverse()
    with pytest.raises(ValueError, match="records have changed since the trainer was made"):
        trainer.run()


def test_another_record_in_place_of_a_broken_one_is_refused(tmp_path):
    class Replaces(Dataset):
        def __getitem__(self, index):
            return super().__getitem__(0)

    loader = DataLoader(Replaces(make_records(patients=20), EnsureTyped("image")), batch_size=2)
    with pytest.raises(ValueError, match="gave a sample of another patient"):
        make_trainer(tmp_path / "ledger", train_data_loader=loader, plan=everybody(20)).run()


def test_an_image_listed_five_times_is_one_unit(tmp_path):
    from monai_privacy.data import count_units

    records = [{"image": "a.png", "label": 0}] * 5 + [{"image": "b.png", "label": 1}]
    assert count_units(Dataset(records), unit="image") == 2


def test_a_buffer_that_is_written_only_with_gradients_is_noticed_before_release(tmp_path):
    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_network()
            self.register_buffer("kept", torch.zeros(1))

        def forward(self, inputs):
            if torch.is_grad_enabled():
                self.kept += inputs.detach().mean()
            return self.body(inputs)

    trainer = make_trainer(tmp_path / "ledger", network=Hides(), plan=everybody(20))
    with pytest.raises(ValueError, match="wrote to its buffers in this step"):
        trainer.run()
    assert not any(entry.steps for entry in trainer.ledger.entries)


def test_half_precision_parameters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="set amp=True"):
        make_trainer(tmp_path / "ledger", network=make_network().bfloat16())


def test_the_claim_names_what_it_rests_on(tmp_path):
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    trainer = make_trainer(tmp_path / "ledger", loss_function=loss)
    trainer.run()
    told = " / ".join(trainer.ledger.entries[0].assumptions)
    for words in ("weights that training began with", "class weights in the loss", "when it was stopped"):
        assert words in told


REFUSALS = {
    "accumulation_steps": ({"accumulation_steps": 2}, "accumulation_steps is 2"),
    "iteration_update": ({"iteration_update": lambda engine, batch: None}, "iteration_update is set"),
    "batch norm": ({"network": nn.Sequential(nn.BatchNorm2d(1), make_network())}, "convert_batch_norm"),
    "data parallel": ({"network": nn.DataParallel(make_network())}, "DataParallel"),
    "uncalibrated": (
        {"plan": DPSGDPlan(num_patients=20, expected_batch_size=5, steps=2, delta=1e-3)},
        "noise_multiplier is None",
    ),
    "foreign parameters": (
        {"optimizer": torch.optim.SGD(make_network().parameters(), 0.1)},
        "6 parameters that are not the network's",
    ),
    "lbfgs": ("lbfgs", "the optimizer is LBFGS"),
    "loader": ({"train_data_loader": [1, 2]}, "train_data_loader is a list"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_before_training_what_would_void_the_guarantee(tmp_path, case):
    options, message = REFUSALS[case]
    if options == "lbfgs":
        network = make_network()
        options = {"network": network, "optimizer": torch.optim.LBFGS(network.parameters())}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "ledger", **options)


def test_refuses_a_loss_or_network_that_mixes_rows_before_anything_is_recorded(tmp_path):
    class MixesRows(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_network()

        def forward(self, inputs):
            return self.body(inputs - inputs.mean(0))

    trainer = make_trainer(tmp_path / "ledger", network=MixesRows(), plan=everybody(20))
    with pytest.raises(ValueError, match="mixes patients"):
        trainer.run()
    assert not any(entry.steps for entry in trainer.ledger.entries)


def test_refuses_a_network_that_keeps_what_it_saw(tmp_path):
    class RemembersMean(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_network()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, inputs):
            self.mean.mul_(0.9).add_(0.1 * inputs.mean().detach())
            return self.body(inputs)

    trainer = make_trainer(tmp_path / "ledger", network=RemembersMean(), plan=everybody(20))
    with pytest.raises(ValueError, match="updates mean in its forward pass"):
        trainer.run()
    assert not any(entry.steps for entry in trainer.ledger.entries)


def test_refuses_a_batch_whose_rows_have_no_owner(tmp_path):
    def merge(samples):
        return {"image": torch.stack([s["image"] for s in samples])[:1], "label": torch.tensor([0])}

    loader = DataLoader(Dataset(make_records(patients=20)), batch_size=2, collate_fn=merge)
    with pytest.raises(ValueError, match="it is unknown which rows are whose"):
        make_trainer(tmp_path / "ledger", train_data_loader=loader, plan=everybody(20)).run()


def test_says_when_data_and_plan_disagree(tmp_path, caplog):
    plan = DPSGDPlan(num_patients=50, expected_batch_size=5, steps=10, delta=1e-3, noise_multiplier=1.0)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path / "ledger", plan=plan, max_epochs=3)
    assert "The data has about 20 patients, the plan says 50" in caplog.text
    assert "are 30 steps, the plan has 10" in caplog.text


def test_image_units_must_be_asked_for(tmp_path):
    records = [{"image": r["image"], "label": r["label"]} for r in make_records(patients=20)]
    with pytest.raises(ValueError, match="without a patient id"):
        make_trainer(tmp_path / "ledger", records=records)
    plan = DPSGDPlan(num_patients=40, expected_batch_size=10, steps=2, delta=1e-3, noise_multiplier=1.0, unit="image")
    trainer = make_trainer(tmp_path / "ledger", records=records, plan=plan)
    trainer.run()
    assert trainer.ledger.entries[0].unit == "image"
