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

from __future__ import annotations

import copy
import logging
import math
import re

import numpy as np
import pytest
import torch
from conftest import make_network, weights
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import ROCAUC, CheckpointSaver, StatsHandler, ValidationHandler, from_engine
from monai.transforms import Activationsd, AsDiscreted, Compose, RandFlipd, RandGaussianNoised, RandShiftIntensity
from torch import Tensor, nn
from torch.utils.data import DataLoader as TensorLoader
from torch.utils.data import TensorDataset

from monai_privacy import pate
from monai_privacy.pate.student_data import viewed
from monai_privacy.pate.students import FixMatchTrainer, pseudo_label_loss, split_answers

SIDE = 12


def blobs(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of noise with a faint pattern, (N, 1, 12, 12), whose sign is the class; no pixel tells much."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(*[torch.linspace(-1, 1, SIDE)] * 2, indexing="ij")
    pattern = torch.exp(-5 * ((row + 0.4) ** 2 + (column + 0.4) ** 2))
    pattern = pattern - pattern.flip(0, 1)
    labels = torch.arange(number) % 2
    signs = (1 - 2 * labels)[:, None, None, None]
    noise = torch.randn(number, 1, SIDE, SIDE, generator=generator)
    return noise + 2.5 * signs * pattern / pattern.norm(), labels


def little_noise(image: Tensor) -> Tensor:
    return image + 0.3 * torch.randn_like(image)


def noise_and_holes(image: Tensor) -> Tensor:
    return (image + 0.5 * torch.randn_like(image)) * (torch.rand_like(image) < 0.6)


def unchanged(row):
    return row


class Counting(nn.Module):
    """A linear network that remembers how many rows each call had."""

    def __init__(self, width: int = 4, num_classes: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(width, num_classes)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.linear(x.flatten(1))


def make_trainer(network: nn.Module, *, labelled=None, unlabelled=None, lr: float = 0.1, **options) -> FixMatchTrainer:
    generator = torch.Generator().manual_seed(1)
    if labelled is None:
        labelled = TensorDataset(torch.randn(6, 1, 2, 2, generator=generator), torch.arange(6) % 2)
    if unlabelled is None:
        unlabelled = torch.randn(20, 1, 2, 2, generator=generator)
    options = {"weak": unchanged, "strong": unchanged, "max_epochs": 2} | options
    options.setdefault("unlabelled_loader", TensorLoader(unlabelled, batch_size=8))
    return FixMatchTrainer(
        device="cpu",
        train_data_loader=TensorLoader(labelled, batch_size=3) if isinstance(labelled, TensorDataset) else labelled,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr),
        loss_function=nn.CrossEntropyLoss(),
        **options,
    )


def test_unlabelled_images_make_a_far_better_student():
    images, labels = blobs(10, seed=0)
    public, _ = blobs(300, seed=1)
    test_images, test_labels = blobs(1000, seed=2)

    def train(trainer_class: type, network: nn.Module, **options) -> float:
        torch.manual_seed(0)
        data = TensorDataset(images, labels)
        options |= {"network": network, "optimizer": torch.optim.Adam(network.parameters(), 3e-3)}
        if trainer_class is SupervisedTrainer:
            options["prepare_batch"] = lambda batch, *_, **__: (viewed(little_noise, batch[0]), batch[1])
        loader = TensorLoader(data, batch_size=10, shuffle=True)
        trainer_class("cpu", 120, loader, loss_function=nn.CrossEntropyLoss(), **options).run()
        with torch.no_grad():
            return float((network.eval()(test_images).argmax(dim=1) == test_labels).double().mean())

    torch.manual_seed(0)
    start = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    plain = train(SupervisedTrainer, copy.deepcopy(start))
    fixmatch = train(
        FixMatchTrainer,
        copy.deepcopy(start),
        unlabelled_loader=TensorLoader(public, batch_size=60, shuffle=True),
        weak=little_noise,
        strong=noise_and_holes,
    )
    assert 0.7 < plain < 0.92
    assert fixmatch > 0.96


def test_one_step_is_that_of_the_paper():
    network = Counting()
    with torch.no_grad():
        network.linear.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
        network.linear.bias.zero_()
    images = torch.tensor([[1.0, 0.5, 0, 0], [0.0, 2.0, 0, 0]]).view(2, 1, 2, 2)
    # Weak views have margins 2, -1.2 and 1 after the shift: probabilities 0.88, 0.77 and 0.73 of the likelier class.
    public = torch.tensor([[2.0, 0.0, 0, 0], [0.0, 1.2, 0, 0], [1.0, 0.0, 0, 0]]).view(3, 1, 2, 2)
    before = copy.deepcopy(network.linear)
    trainer = make_trainer(
        network,
        labelled=[(images, torch.tensor([0, 0]))],
        unlabelled_loader=[public],
        weak=lambda image: image + 1.0,
        strong=lambda image: image * torch.tensor([[-1.0, 3.0], [1.0, 1.0]]) + 0.25,
        threshold=0.75,
        unlabelled_weight=0.7,
        max_epochs=1,
        decollate=False,
    )
    trainer.run()

    def cross_entropy(logits: Tensor, label: int) -> Tensor:
        return -(logits[label] - math.log(sum(math.exp(float(logit)) for logit in logits)))

    # By hand: labelled rows 0 and 0; strong views of the first two public rows against labels 0 and 1; the third left out.
    labelled = [cross_entropy(torch.tensor([2.0, 1.5]), 0), cross_entropy(torch.tensor([1.0, 3.0]), 0)]
    unlabelled = [cross_entropy(torch.tensor([-1.75, 0.25]), 0), cross_entropy(torch.tensor([0.25, 3.85]), 1)]
    expected_unlabelled = sum(unlabelled) / 3
    expected = sum(labelled) / 2 + 0.7 * expected_unlabelled
    assert float(trainer.state.output["unlabelled_loss"]) == pytest.approx(float(expected_unlabelled), rel=1e-5)
    assert float(trainer.state.output["loss"].detach()) == pytest.approx(float(expected), rel=1e-5)
    assert trainer.state.output["pseudo_labels"] == 2
    assert network.calls == [2 + 3 + 3]
    # The step: gradients of the labelled and of the passed strong views alone, none through the weak ones.
    views = (images + 1).flatten(1), (public * torch.tensor([[-1.0, 3.0], [1.0, 1.0]]) + 0.25).flatten(1)[:2]
    total = nn.functional.cross_entropy(before(views[0]), torch.tensor([0, 0]))
    total = total + 0.7 * nn.functional.cross_entropy(before(views[1]), torch.tensor([0, 1]), reduction="sum") / 3
    total.backward()
    torch.testing.assert_close(network.linear.weight, before.weight - 0.1 * before.weight.grad)
    torch.testing.assert_close(network.linear.bias, before.bias - 0.1 * before.bias.grad)


def test_labels_come_from_confident_weak_views_alone():
    weak = torch.tensor([[3.0, 0.0], [0.0, 0.1], [0.0, 5.0]], requires_grad=True)
    strong = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    found = pseudo_label_loss(weak, strong, threshold=0.9)
    assert found.passed.tolist() == [True, False, True]
    found.loss.backward()
    assert weak.grad is None
    assert (strong.grad.abs().sum(dim=1) > 0).tolist() == [True, False, True]
    assert float(found.loss.detach()) == pytest.approx((math.log(1 + math.e) + math.log(1 + math.exp(-1))) / 3)
    # A probability of exactly the threshold passes; one that overflows outside the mask does no harm.
    assert pseudo_label_loss(torch.zeros(1, 2), strong[:1], threshold=0.5).passed.tolist() == [True]
    infinite = torch.tensor([[float("-inf"), 0.0], [0.0, 1.0]])
    assert float(pseudo_label_loss(torch.zeros(2, 2), infinite, threshold=0.9).loss) == 0.0


def test_batch_norm_sees_all_rows_together():
    images, labels = blobs(4, seed=0)
    public, _ = blobs(6, seed=1)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(SIDE**2, momentum=1.0), nn.Linear(SIDE**2, 2)).eval()
    make_trainer(
        network,
        labelled=[(images, labels)],
        unlabelled_loader=[public],
        weak=lambda image: image + 1,
        strong=lambda image: 3 * image,
        max_epochs=1,
    ).run()
    together = torch.cat([images + 1, public + 1, 3 * public]).flatten(1)
    torch.testing.assert_close(network[1].running_mean, together.mean(dim=0))
    torch.testing.assert_close(network[1].running_var, together.var(dim=0))
    assert network.training


def test_without_weight_it_is_a_supervised_trainer():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(6, 1, 2, 2, generator=generator), torch.arange(6) % 2)
    events: list[list[str]] = []
    states = []
    networks = [Counting(), Counting()]
    for network in networks:
        options = {"max_epochs": 3, "train_data_loader": TensorLoader(data, batch_size=2)}
        if network is networks[0]:
            trainer = make_trainer(
                network, labelled=options.pop("train_data_loader"), unlabelled_weight=0.0, max_epochs=3
            )
        else:
            optimizer = torch.optim.SGD(network.parameters(), 0.1)
            trainer = SupervisedTrainer(
                "cpu", network=network, optimizer=optimizer, loss_function=nn.CrossEntropyLoss(), **options
            )
        seen: list[str] = []
        for event in (*IterationEvents, Events.EPOCH_COMPLETED, Events.ITERATION_COMPLETED, Events.COMPLETED):
            trainer.add_event_handler(event, lambda engine, into=seen, name=event.name: into.append(name))
        trainer.run()
        events.append(seen)
        states.append((trainer.state.iteration, trainer.state.epoch, trainer.state.epoch_length))
    assert events[0] == events[1]
    assert states[0] == states[1] == (9, 3, 3)
    torch.testing.assert_close(weights(networks[0]), weights(networks[1]), rtol=0, atol=1e-6)


def test_handlers_metrics_and_evaluator_work_as_with_any_trainer(tmp_path):
    network = make_network()
    records = [
        {"image": torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(n)) + n % 2, "label": n % 2}
        for n in range(12)
    ]
    after = Compose([Activationsd("pred", softmax=True), AsDiscreted("label", to_onehot=2)])
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Dataset(records), batch_size=4),
        network=network,
        postprocessing=after,
        key_val_metric={"auc": ROCAUC(output_transform=from_engine(["pred", "label"]))},
    )
    lines: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("monai.handlers.StatsHandler")
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    trainer = make_trainer(
        network,
        labelled=DataLoader(Dataset(records), batch_size=4),
        unlabelled_loader=DataLoader(Dataset([{"image": record["image"]} for record in records]), batch_size=6),
        weak=RandFlipd("image", prob=0.5, spatial_axis=1),
        strong=Compose([RandFlipd("image", prob=0.5, spatial_axis=0), RandGaussianNoised("image", prob=1.0, std=0.5)]),
        threshold=0.5,
        postprocessing=after,
        key_train_metric={"train_auc": ROCAUC(output_transform=from_engine(["pred", "label"]))},
        train_handlers=[
            ValidationHandler(1, evaluator),
            StatsHandler(output_transform=from_engine(["pseudo_labels"], first=True), tag_name="passed"),
            CheckpointSaver(str(tmp_path), {"net": network}, save_interval=1),
        ],
    )
    trainer.run()
    logger.removeHandler(listener)
    assert trainer.state.metrics["train_auc"] > 0.5
    assert evaluator.state.metrics["auc"] > 0.5
    assert len(list(tmp_path.glob("*.pt"))) == 2
    # One image of the labelled batch each, as any trainer has it after decollation. Everything passes one half.
    assert len(trainer.state.output) == 4
    assert set(trainer.state.output[0]) == {"image", "label", "pred", "loss", "unlabelled_loss", "pseudo_labels"}
    assert sum("passed: 6" in line for line in lines) == trainer.state.iteration == 6
    assert "pseudo_labels" not in trainer.state.metrics


def test_views_of_dictionaries_are_drawn_for_each_row():
    torch.manual_seed(0)
    images = MetaTensor(torch.zeros(5, 1, 4, 4))
    batch = {"image": images, "label": torch.arange(5), "name": list("abcde"), "spacing": (1.0, 1.0), "of": None}
    seen: list[dict] = []

    def change(row: dict) -> dict:
        seen.append(dict(row))
        row["image"] += torch.rand(())
        return row

    found = viewed(change, batch)
    assert len(set(found["image"].flatten(1)[:, 0].tolist())) == 5
    assert type(found["image"]) is Tensor
    assert found["label"].tolist() == [0, 1, 2, 3, 4]
    assert found["label"].dtype == torch.long
    assert {key: found[key] for key in ("name", "spacing", "of")} == {
        key: batch[key] for key in ("name", "spacing", "of")
    }
    assert [(row["name"], int(row["label"]), row["image"].shape) for row in seen] == [
        (name, number, (1, 4, 4)) for number, name in enumerate("abcde")
    ]
    # Neither transforms in place nor the result reach the caller's batch.
    assert batch["image"] is images
    assert float(images.abs().max()) == 0.0


def test_views_of_tensors_sequences_and_arrays():
    torch.manual_seed(0)
    images = torch.zeros(5, 1, 4, 4)
    shift = RandShiftIntensity(offsets=1.0, prob=1.0)
    for batch in (images, [images], (images, torch.arange(5))):
        found = viewed(shift, batch)
        found, rest = found if isinstance(batch, tuple) else (found, torch.arange(5))
        assert len(set(found.flatten(1)[:, 0].tolist())) == 5
        assert type(found) is Tensor
        assert rest.tolist() == [0, 1, 2, 3, 4]
    assert float(viewed(lambda image: image.add_(1), images).min()) == 1.0
    assert float(images.abs().max()) == 0.0
    ready = viewed(lambda row: {"image": row["strong"]}, {"image": images, "strong": images + 7})
    assert float(ready["image"].min()) == 7.0
    array = viewed(lambda row: {"image": np.full((1, 2, 2), 3.0, dtype=np.float32)}, {"image": images})
    assert array["image"].shape == (5, 1, 2, 2)
    with pytest.raises(ValueError, match=r"the batch has no tensor among \['image'\]"):
        viewed(unchanged, {"image": "file.png"})


def test_unlabelled_images_come_round_again_and_their_labels_are_not_looked_at():
    network = Counting()
    starts = []

    class Loader:
        def __iter__(self):
            starts.append(len(network.calls))
            yield from ([torch.ones(size, 1, 2, 2), torch.full((size,), -1)] for size in (2, 1))

    make_trainer(network, unlabelled_loader=Loader(), max_epochs=3).run()
    assert network.calls == [3 + 4, 3 + 2] * 3
    assert starts == [0, 2, 4]


@pytest.mark.parametrize("loader", [[], (torch.ones(2, 1, 2, 2) for _ in range(2))])
def test_a_loader_that_gives_nothing_is_refused(loader):
    with pytest.raises(ValueError, match="unlabelled_loader gives no batch, or can be read only once"):
        make_trainer(Counting(), unlabelled_loader=loader).run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the gradient scaler then wants the network on the device")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_mixed_precision_takes_the_scaler():
    network, other = Counting(), Counting()
    make_trainer(network, amp=True).run()
    make_trainer(other).run()
    assert torch.equal(weights(network), weights(other))


def test_answers_divide_the_records():
    records = [{"image": f"{number}.png", "label": 9, "site": "x"} for number in range(5)]
    before = copy.deepcopy(records)
    for labels in (torch.tensor([1, -1, 0, -1, 2]), [1, -1, 0, -1, 2], np.array([1, -1, 0, -1, 2])):
        labelled, unlabelled = split_answers(records, labels)
        assert labelled == [
            {"image": f"{n}.png", "site": "x", "label": answer} for n, answer in ((0, 1), (2, 0), (4, 2))
        ]
        assert unlabelled == [{"image": f"{number}.png", "site": "x"} for number in (1, 3)]
        assert all(type(record["label"]) is int for record in labelled)
    labelled, unlabelled = split_answers(records, [0, -1, -1, -1, -1], label_key="answer")
    assert labelled == [records[0] | {"answer": 0}]
    assert records == before


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 0], "there are 3 labels for 2 records"),
        ([0, -2], "labels[1] is -2, but must be a class from 0"),
        ([0.5, 1], "labels[0] is 0.5"),
        (torch.tensor([[0, 1], [1, 0]]), "labels[0] is [0, 1]"),
        ([0, None], "labels[1] is None"),
    ],
)
def test_odd_answers_are_refused(labels, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        split_answers([{"image": 0}, {"image": 1}], labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold is 1.5, which is no probability"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"unlabelled_weight": -1.0}, "unlabelled_weight is -1.0"),
        ({"unlabelled_weight": float("inf")}, "unlabelled_weight is inf"),
        ({"iteration_update": lambda engine, batch: None}, "iteration_update and accumulation_steps"),
        ({"accumulation_steps": 2}, "iteration_update and accumulation_steps"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make_trainer(Counting(), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (Counting(num_classes=1), {}, "the network gives (19, 1) for 19 images"),
        (nn.Conv2d(1, 2, 1), {}, "the network gives (19, 2, 2, 2)"),
        (Counting(), {"inferer": lambda x, network: (network(x),)}, "the network gives tuple for 19 images"),
        (Counting(), {"inferer": lambda x, network: network(x)[1:]}, "the network gives (18, 2) for 19 images"),
        (
            Counting(),
            {"prepare_batch": lambda batch, *_, **__: (batch[0], batch[1], (), {})},
            "prepare_batch gives 4 values",
        ),
    ],
)
def test_networks_and_batches_that_do_not_fit_are_refused(network, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make_trainer(network, **options).run()
    assert "\n" not in str(error.value)


def test_the_package_gives_them_when_asked():
    assert pate.FixMatchTrainer is FixMatchTrainer
    assert all(getattr(pate, name) is not None for name in pate.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pate.nothing  # noqa: B018


def test_the_iteration_needs_a_batch():
    with pytest.raises(ValueError, match="Must provide batch data"):
        make_trainer(Counting(), labelled=[None]).run()
