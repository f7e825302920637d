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

"""Set-ups in which Opacus 1.6 trains without an error and without the privacy it claims: here exact, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import make_network, make_records, make_trainer, weights
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines.utils import IterationEvents
from monai.losses import DiceLoss
from monai.transforms import Compose, EnsureTyped, RandSpatialCropSamplesd
from monai.utils import set_determinism
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import BatchSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from monai_privacy import DPSGDPlan, PrivacyLedger
from monai_privacy.mechanisms.clipping import GradientClipper

BOUND = 0.01
# Far below and far above the norms of ordinary patients.
BOUNDS = (BOUND, 100.0)


def everybody(patients: int, steps: int = 1, bound: float = BOUND) -> DPSGDPlan:
    """A plan that draws every patient in each step, almost without noise: what is left is the clipped sum."""
    return DPSGDPlan(
        num_patients=patients,
        expected_batch_size=patients,
        steps=steps,
        delta=1e-3,
        max_grad_norm=bound,
        noise_multiplier=1e-9,
    )


def released(
    tmp_path, records: list[dict], network: Callable[[], nn.Module] = make_network, bound: float = BOUND, **options
) -> Tensor:
    """The clipped sum over all patients, as one step of plain SGD shows it."""
    count, net = len({record["patient_id"] for record in records}), network()
    before = weights(net)
    path, plan = tmp_path / str(len(list(tmp_path.iterdir()))), everybody(count, bound=bound)
    make_trainer(path, records=records, network=net, plan=plan, learning_rate=1.0, max_epochs=1, **options).run()
    return (before - weights(net)) * count


def by_definition(
    records: list[dict], loss: Callable, network: Callable[[], nn.Module] = make_network, bound: float = BOUND
) -> Tensor:
    """The same by plain autograd: each patient's mean gradient over their rows, clipped once."""
    net = network()
    total = torch.zeros_like(weights(net))
    for patient in dict.fromkeys(record["patient_id"] for record in records):
        own = [record for record in records if record["patient_id"] == patient]
        losses = [loss(net(r["image"][None]), torch.as_tensor(r["label"])[None]).mean() for r in own]
        gradient = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(sum(losses) / len(own), list(net.parameters()))]
        )
        total += gradient * min(1.0, bound / float(gradient.norm()))
    return total


def assert_exact(
    tmp_path, records: list[dict], loss: Callable, network: Callable[[], nn.Module] = make_network, **options
) -> None:
    """The released sum is that of the definition, whether patients are clipped or not."""
    options = {"loss_function": loss} | options
    for bound in BOUNDS:
        close(released(tmp_path, records, network, bound, **options), by_definition(records, loss, network, bound))


def outlier(records: list[dict], scale: float = 1e4) -> list[dict]:
    """The first record, many times as large as the others."""
    return [records[0] | {"image": records[0]["image"] * scale}, *records[1:]]


def assert_bounded(tmp_path, records: list[dict], **options) -> None:
    """Leaving out any of the first patients moves the sum by at most the bound."""
    whole = released(tmp_path, records, **options)
    for patient in ("patient-0", "patient-1"):
        rest = [record for record in records if record["patient_id"] != patient]
        moved = float((whole - released(tmp_path, rest, **options)).norm())
        assert 0 < moved <= BOUND * (1 + 1e-3)


def assert_refused(tmp_path, message: str, **options) -> None:
    """Refused with this message, and nothing recorded: when the trainer is made, or at the first step."""
    ledger = PrivacyLedger(tmp_path / "refused")
    with pytest.raises(ValueError, match=message):
        make_trainer(ledger, plan=everybody(20), max_epochs=1, **options).run()
    assert not any(entry.steps for entry in ledger.entries)


def close(found: Tensor, expected: Tensor) -> None:
    # In float32, and as the difference of weights: wrong by a bound's fraction is what is looked for.
    assert float((found - expected).norm()) < 1e-3 * float(expected.norm())


@pytest.mark.parametrize("labels", [1, 5])
def test_s01_binary_loss_on_columns_of_outputs(tmp_path, labels):
    """A (B, 1) loss times (B,) factors broadcasts to (B, B): up to 31 bounds for one patient of 16."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*make_network()[:-1], nn.Linear(64, labels))

    def label(record: dict) -> Tensor:
        return (torch.arange(labels) + record["label"]) % 2.0

    records = outlier([r | {"label": label(r)} for r in make_records(patients=16, images=1)])
    loss = nn.BCEWithLogitsLoss()
    assert_exact(tmp_path, records, loss, network)
    assert_bounded(tmp_path, records, network=network, loss_function=loss)


def test_s02_the_default_loss_is_made_one_for_each_row(tmp_path):
    """A mean over the batch leaves nothing to clip: one outlier moved the sum by 62,000 bounds."""
    records, loss = outlier(make_records(patients=8, images=1), 1e6), nn.CrossEntropyLoss()
    assert_exact(tmp_path, records, loss)
    assert_bounded(tmp_path, records, loss_function=loss)


def test_s03_class_weights_and_batch_wide_normalisers(tmp_path):
    """A normaliser over the batch couples patients: up to 8.6 bounds for one."""
    records, weight = make_records(patients=6), torch.tensor([1.0, 20.0])

    def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="none") * weight[targets]

    loss = nn.CrossEntropyLoss(weight=weight)
    assert_exact(tmp_path, records, weighted, loss_function=loss)
    assert_bounded(tmp_path, records, loss_function=loss)

    def valid_of_batch(outputs: Tensor, targets: Tensor) -> Tensor:
        valid = (targets >= 0).float()
        wide = functional.one_hot(targets.clamp(min=0), 2).float()
        losses = functional.binary_cross_entropy_with_logits(outputs, wide, reduction="none").sum(1)
        return losses * valid / valid.sum().clamp(min=1)

    missing = [record | {"label": -1} if at % 5 == 2 else record for at, record in enumerate(records)]
    masked = lambda o, t: valid_of_batch(o, t).sum()  # noqa: E731  one number for the batch: asked row by row
    assert_bounded(tmp_path, missing, loss_function=masked)
    assert_refused(tmp_path, "mixes patients", loss_function=valid_of_batch)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_s03_dice_over_the_batch(tmp_path, channels):
    """It gives one number a channel: with as many rows as channels they look like one number a row."""

    def segment() -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv2d(1, channels, 3, padding=1)

    def label(image: Tensor) -> Tensor:
        return torch.cat([(image > at / 2).float() for at in range(channels)])

    records = [r | {"label": label(r["image"])} for r in make_records(patients=10, images=1)]
    plain = DiceLoss(sigmoid=True)
    expected = by_definition(records, plain, segment)
    close(released(tmp_path, records, segment, loss_function=plain), expected)
    coupled = DiceLoss(sigmoid=True, batch=True)
    for rows in (2, 3, 4, 5, None):
        try:
            found = released(tmp_path, records, segment, loss_function=coupled, max_physical_batch_size=rows)
        except ValueError as error:
            if "mixes patients" not in str(error):
                raise
        else:
            close(found, expected)


@pytest.mark.parametrize("how", ["frozen", "not affine", "in evaluation", "without statistics"])
def test_s04_batch_norm_without_trained_parameters(tmp_path, how):
    """Its statistics absorb patients un-noised, and couple them: 2.1 bounds for one of 32."""
    norm = nn.BatchNorm2d(4, affine=how != "not affine", track_running_stats=how != "without statistics")
    norm.requires_grad_(False)
    norm.train(how != "in evaluation")
    network = make_network()
    network[1] = norm
    assert_refused(tmp_path, "convert_batch_norm", network=network)

    data = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    double, loss = network.double(), nn.CrossEntropyLoss()
    clipper = GradientClipper(double, loss)
    together = clipper(data, torch.arange(5), BOUND)
    alone = [clipper((data[0][i : i + 1], data[1][i : i + 1]), torch.tensor([0]), BOUND) for i in range(5)]
    torch.testing.assert_close(together.norms, torch.cat([one.norms for one in alone]))


class Arranged(nn.Sequential):
    """Three channels, in another order in memory than that of their shape."""

    def __init__(self, order: str) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
        self.order = order

    def forward(self, inputs):
        images = inputs.repeat(1, 3, 1, 1)
        if self.order == "transposed":
            return super().forward(images.transpose(2, 3).contiguous().transpose(2, 3))
        return super().forward(images.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("order", ["channels last", "transposed"])
def test_s05_channels_last(tmp_path, order, weights_too):
    """Gradients of convolutions were 38 % wrong, and the bound of norms broken 5.5 times."""
    layout = torch.channels_last if weights_too else torch.contiguous_format
    assert_exact(
        tmp_path, make_records(patients=5), nn.CrossEntropyLoss(), lambda: Arranged(order).to(memory_format=layout)
    )


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_s06_padding_other_than_zeros(tmp_path, mode):
    """Gradients were 13 % wrong."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, padding_mode=mode), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
            nn.Linear(256, 2),
        )  # fmt: skip

    records = make_records(patients=5)
    assert_exact(tmp_path, records, nn.CrossEntropyLoss(), network)


def test_s07_crops_of_one_image_are_one_patient(tmp_path):
    """Each of four crops was clipped by itself: four bounds for one patient."""
    crops = Compose([EnsureTyped("image"), RandSpatialCropSamplesd("image", 8, num_samples=4, random_size=False)])
    alone = released(tmp_path, make_records(patients=1, images=3), transform=crops)
    assert float(alone.norm()) == pytest.approx(BOUND, rel=1e-3)
    assert_bounded(tmp_path, outlier(make_records(patients=4, images=2)), transform=crops)


def test_s08_slices_that_are_merged_into_the_batch(tmp_path):
    """2.5D: each slice was clipped by itself, 8.5 times off."""

    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))

        def forward(self, inputs):
            slices = inputs.transpose(1, 2).flatten(0, 1)
            return self.body(slices).mean(dim=(2, 3)).unflatten(0, (len(inputs), -1)).mean(1)

    def network() -> nn.Module:
        torch.manual_seed(0)
        return Slices()

    records = make_records(patients=4, images=2, spatial_dims=3)
    for method in ("auto", "one_pass"):
        assert_exact(tmp_path, records, nn.CrossEntropyLoss(), network, clipping_method=method)
    assert_bounded(tmp_path, outlier(records), network=network)


@pytest.mark.parametrize("name", ["SubsetRandomSampler", "WeightedRandomSampler"])
def test_s09_a_sampler_is_not_dropped_without_a_word(tmp_path, name):
    """The sampler was discarded: held-out patients were trained on."""
    samplers = {
        "SubsetRandomSampler": SubsetRandomSampler(range(10)),
        "WeightedRandomSampler": WeightedRandomSampler([1.0] * 40, 10),
    }
    loader = DataLoader(Dataset(make_records(patients=20), EnsureTyped("image")), sampler=samplers[name])
    assert_refused(tmp_path, f"{name}.*Remove the sampler", train_data_loader=loader)


def test_s10_no_draw_but_a_poisson_draw(tmp_path):
    """Shuffled batches were accounted as Poisson draws: epsilon 5.7 for one of 26."""
    records, drawn = make_records(patients=20), []
    loader = DataLoader(Dataset(records, EnsureTyped("image")), batch_size=8, shuffle=True, drop_last=True)
    plan = DPSGDPlan(num_patients=20, expected_batch_size=5, steps=60, delta=1e-3, noise_multiplier=1.0)
    trainer = make_trainer(tmp_path / "ledger", train_data_loader=loader, plan=plan, max_epochs=1, epoch_length=60)
    trainer.add_event_handler(
        Events.GET_BATCH_COMPLETED,
        lambda e: drawn.append([int(p.patient_index.max()) + 1 for p in e.state.batch.parts]),
    )
    trainer.run()
    sizes = torch.tensor([float(sum(draw)) for draw in drawn])
    assert len(sizes) == 60
    # Of fixed size nothing would vary. False alarms: the mean is off by 6 deviations, or the variance by 0.27 to 3.
    assert abs(float(sizes.mean()) - 5) < 1.5
    assert 1.0 < float(sizes.var()) < 11.3
    assert trainer.ledger.entries[0].step == plan.step_event
    own = DataLoader(
        loader.dataset, batch_sampler=type("Mine", (BatchSampler,), {})(SequentialSampler(records), 5, True)
    )
    assert_refused(tmp_path, "Mine as batch sampler", train_data_loader=own)


def test_s11_a_fixed_seed_repeats_neither_draw_nor_noise(tmp_path):
    """After set_determinism the noise was known to whoever knew the seed."""

    def run(name: str) -> Tensor:
        set_determinism(seed=7)
        network = make_network()
        make_trainer(tmp_path / name, network=network, max_epochs=1).run()
        return weights(network)

    def noise(name: str) -> Tensor:
        set_determinism(seed=7)
        network = make_network()
        plan = DPSGDPlan(
            num_patients=20, expected_batch_size=20, steps=1, delta=1e-3, noise_multiplier=1.0, max_grad_norm=1.0
        )
        before = weights(network)
        make_trainer(tmp_path / name, network=network, plan=plan, max_epochs=1).run()
        return weights(network) - before

    try:
        assert not torch.equal(run("one"), run("two"))
        # Everybody is drawn: what differs is noise.
        assert float((noise("three") - noise("four")).abs().min()) > 0
    finally:
        set_determinism(seed=None)


def test_s12_hooks_of_the_user_do_not_replace_the_accountant(tmp_path):
    """A hook after the optimizer's step took the accountant's place: epsilon 0."""
    network, calls = make_network(), []
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))
    trainer = make_trainer(tmp_path / "ledger", network=network, optimizer=optimizer)
    for event in (*Events, *IterationEvents):
        if event not in (Events.EXCEPTION_RAISED, Events.TERMINATE, Events.INTERRUPT):
            trainer.add_event_handler(event, lambda e: None)
    trainer.run()
    steps = trainer.state.iteration
    assert steps == 8
    assert calls == ["before", "after"] * steps
    assert trainer.ledger.entries[0].steps == steps
    assert trainer.ledger.epsilon(1e-3) == pytest.approx(trainer.plan.epsilon(steps=steps))
    assert trainer.ledger.epsilon(1e-3) > 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_record_that_is_not_finite_spoils_no_model(tmp_path, bad):
    """One such sample made the whole network NaN."""
    records = outlier(make_records(patients=6), bad)
    close(released(tmp_path, records), released(tmp_path, records[2:]))
    network = make_network()
    make_trainer(tmp_path / "ledger", records=records, network=network, plan=everybody(6, steps=4), max_epochs=4).run()
    assert torch.isfinite(weights(network)).all()
