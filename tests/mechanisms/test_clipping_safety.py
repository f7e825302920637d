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

"""Networks and losses for which the fast method would be wrong: each goes the slow way, and none gets a wrong norm."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_clipping_operations import assert_close, assert_exact, flat, patient_by_patient
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from monai_privacy.mechanisms.clipping import GradientClipper
from monai_privacy.mechanisms.probe import require_independent_rows

LOSS = nn.CrossEntropyLoss()
PATIENTS = torch.tensor([7, 1, 7, 0, 1, 7, 2])
SINGLE = torch.arange(7)
PLACES = ("before", "between", "behind")


def batch(shape: tuple[int, ...] = (1, 6, 6), seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((7, *shape), generator=generator, dtype=torch.float64)
    return inputs * torch.linspace(0.3, 2.0, 7).double().reshape(-1, *[1] * len(shape)), torch.arange(7) % 2


class Network(nn.Module):
    """A convolution, what a test puts between, a linear layer, and what it puts behind."""

    def __init__(self, before=None, between=None, behind=None, *, width: int = 4) -> None:
        super().__init__()
        self.before, self.between, self.behind = before, between, behind
        self.body = nn.Conv2d(1, width, 3, padding=1)
        self.head = nn.Linear(width, 2)

    def forward(self, inputs):
        inputs = inputs if self.before is None else self.before(inputs)
        features = torch.tanh(self.body(inputs)).mean(dim=(2, 3))
        features = features if self.between is None else self.between(features)
        logits = self.head(features)
        return logits if self.behind is None else self.behind(logits)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def assert_goes_the_slow_way(
    network: nn.Module, data: tuple[Tensor, Tensor], patients: Tensor = PATIENTS, *, loss=LOSS, says: str = ""
) -> None:
    """Exact with "auto", refused with "one_pass", and never a wrong number in between."""
    total, norms, bound = patient_by_patient(network, loss, data, patients)
    clipper = GradientClipper(network, loss)
    assert_close(clipper(data, patients, bound), total, norms)
    assert len(clipper.faults) == 1
    assert says in clipper.faults[0]
    assert_close(clipper(data, patients, bound), total, norms)
    with pytest.raises(ValueError, match=r"method is 'one_pass', but .* one at a time"):
        GradientClipper(network, loss, method="one_pass")(data, patients, bound)


# What follows has parameters in operations that are not heard.


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((4,), 0.1))

    def forward(self, features):
        return features * self.gamma


class Product(nn.Module):
    """A weight in a matrix product of torch's own."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.multiply = nn.Linear(4, 4), multiply

    def forward(self, features):
        return self.multiply(features, self.layer.weight) + self.layer.bias


class HeardAndNot(nn.Module):
    """Used by a linear layer and by a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, features):
        return self.layer(features) + features @ self.layer.weight


class PartOfWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, features):
        return functional.linear(features, self.layer.weight[1:5, 1:5], self.layer.bias[:4])


class Prompt(nn.Module):
    """A parameter for an input."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.layer = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 4)

    def forward(self, features):
        return features + self.layer(self.prompt)


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(4, 4, 4)

    def forward(self, features):
        return self.layer(features, torch.tanh(features))


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.Module], *, batch_first: bool) -> None:
        super().__init__()
        self.layer, self.batch_first = layer(1, 4, batch_first=batch_first), batch_first

    def forward(self, features):
        steps = features[:, :, None]
        if self.batch_first:
            return self.layer(steps)[0][:, -1]
        return self.layer(steps.transpose(0, 1))[0][-1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, features):
        tokens = features.unflatten(1, (2, 2))
        return features + self.layer(tokens, tokens, tokens)[0].flatten(1)


class Unbatched(nn.Module):
    """One image at a time, without a dimension for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, features):
        return torch.stack([self.layer(row[None])[0] for row in features])


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, features):
        return torch.vmap(lambda row: torch.tanh(self.layer(row[None]))[0])(features)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, features):
        return Scale.apply(features, self.weight)


class GradientInside(nn.Module):
    """An energy network: what it returns is a gradient of what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, features):
        with torch.enable_grad():
            features = features if features.requires_grad else features.clone().requires_grad_()
            return torch.autograd.grad(self.energy(features).sum(), features, create_graph=True)[0]


class Words(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features):
        return features + self.layer((features > 0).long()).reshape(len(features), -1, 4).mean(1)


class OtherNames(nn.Module):
    """The functions of torch that torch.nn.functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, features):
        return torch.group_norm(features[:, :, None] * torch.ones(3), 2, self.norm.weight, self.norm.bias, 1e-5).sum(2)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double())


UNHEARD = {
    "bare parameter": (LayerScale, "between.gamma"),
    "matmul": (lambda: Product(lambda x, w: torch.matmul(x, w.T)), "between.layer.weight"),
    "at sign": (lambda: Product(lambda x, w: x @ w.T), "between.layer.weight"),
    "einsum": (lambda: Product(lambda x, w: torch.einsum("bi,oi->bo", x, w)), "between.layer.weight"),
    "heard and not": (HeardAndNot, "between.layer.weight"),
    "part of a weight": (PartOfWeight, "between.layer.weight"),
    "prompt": (Prompt, ""),
    "bilinear": (Bilinear, "between.layer.weight"),
    "lstm": (lambda: Recurrent(nn.LSTM, batch_first=True), "between.layer"),
    "gru, steps first": (lambda: Recurrent(nn.GRU, batch_first=False), "between.layer"),
    "attention": (Attention, "between.layer.in_proj_weight"),
    "weight norm": (lambda: weight_norm(nn.Linear(4, 4)), "between."),
    "script": (scripted, "between"),
    "unbatched": (Unbatched, "between.layer.weight"),
    "own function": (OwnFunction, "between.weight"),
    "gradient inside": (GradientInside, "gradient of a gradient"),
    "embedding bag": (lambda: Words(nn.EmbeddingBag(2, 4)), "between.layer.weight"),
    "frequency": (lambda: Words(nn.Embedding(2, 4, scale_grad_by_freq=True)), "between.layer.weight"),
    "torch.group_norm": (OtherNames, "between.norm.weight"),
    "vmap": (Mapped, ""),
}


@pytest.mark.parametrize("name", UNHEARD)
def test_a_parameter_that_is_used_unheard(name):
    make, says = UNHEARD[name]
    assert_goes_the_slow_way(made(lambda: Network(between=make())), batch(), says=says)


@pytest.mark.parametrize("name", ["bare parameter", "weight norm"])
def test_a_frozen_parameter_may_be_used_unheard(name):
    network = made(lambda: Network(between=UNHEARD[name][0]()))
    for parameter in network.between.parameters():
        parameter.requires_grad_(False)
    assert_exact(network, batch(), PATIENTS, loss=LOSS)


def test_a_trained_parameter_beside_an_unheard_one_that_is_not_asked_for():
    network, (inputs, targets) = made(lambda: Network(between=LayerScale())), batch()
    total, _, _ = patient_by_patient(network, LOSS, (inputs, targets), PATIENTS, 1e9)
    head = list(network.head.parameters())
    clipper = GradientClipper(network, LOSS, parameters=head, method="one_pass")
    found = flat(clipper((inputs, targets), PATIENTS, 1e9).gradients)
    torch.testing.assert_close(found, total[-len(found) :], rtol=1e-12, atol=1e-12)


def test_a_compiled_network():
    network = nn.Sequential(made(Network))
    network[0]._compiled_call_impl = network[0]._call_impl  # as network[0].compile() has it, without compiling
    assert_goes_the_slow_way(network, batch(), says="torch.compile")


# What follows decides by what it sees.


class Branches(nn.Module):
    """One of two layers for the whole batch, by its mean."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.low, self.high, self.threshold = nn.Linear(4, 4), nn.Linear(4, 4), threshold

    def forward(self, features):
        return self.high(features) if features.mean() > self.threshold else self.low(features)


class Routes(nn.Module):
    """One of two layers for each row, as a mixture of experts has it."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.low, self.high, self.threshold = nn.Linear(4, 4), nn.Linear(4, 4), threshold

    def forward(self, features):
        out, up = torch.zeros_like(features), features.mean(1) > self.threshold
        for rows, layer in ((up, self.high), (~up, self.low)):
            if bool(rows.any()):
                out[rows] = layer(features[rows])
        return out


class Repeats(nn.Module):
    """One layer as often as it takes."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.layer, self.threshold = nn.Linear(4, 4), threshold

    def forward(self, features):
        for _ in range(4):
            features = torch.tanh(self.layer(features)) * 0.7
            if features.detach().abs().max() < abs(self.threshold):
                break
        return features


class Signs(nn.Module):
    """The same layer whatever it sees, but another input."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.layer, self.threshold = nn.Linear(4, 4), threshold

    def forward(self, features):
        return self.layer(-features if features.mean().item() > self.threshold else features)


@pytest.mark.parametrize("threshold", [-0.6, -0.2, -0.1, 0.0, 0.1, 0.2, 0.6])
@pytest.mark.parametrize("layer", [Branches, Routes, Repeats, Signs])
def test_control_flow_that_depends_on_data_never_gives_a_wrong_norm(layer, threshold):
    network, data = made(lambda: Network(between=layer(threshold))), batch()
    for patients in (PATIENTS, SINGLE):
        total, norms, bound = patient_by_patient(network, LOSS, data, patients)
        # By one path or the other: a threshold that nothing crosses decides nothing.
        assert_close(GradientClipper(network, LOSS)(data, patients, bound), total, norms)


class Rarely(nn.Module):
    """What no synthetic row is large enough for: another layer, or a bare parameter."""

    def __init__(self, *, bare: bool) -> None:
        super().__init__()
        self.usual, self.other = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.gamma, self.bare = nn.Parameter(torch.full((1,), 0.5)), bare

    def forward(self, inputs):
        large = inputs.abs().max() > 1e6
        features = self.other(inputs) if large and not self.bare else self.usual(inputs)
        return torch.tanh(features * self.gamma if large and self.bare else features)


@pytest.mark.parametrize(("bare", "says"), [(True, "depends on what it sees"), (False, "depends on what it sees")])
def test_what_only_large_inputs_lead_to(bare, says):
    (inputs, targets), network = batch(), made(lambda: Network(before=Rarely(bare=bare)))
    inputs[3] *= 1e7
    clipper = GradientClipper(network, LOSS)
    for kept in ([0, 1, 2, 4], list(range(7))):
        data, patients = (inputs[kept], targets[kept]), PATIENTS[kept]
        assert_close(clipper(data, patients, 0.1), *patient_by_patient(network, LOSS, data, patients, 0.1)[:2])
    assert len(clipper.faults) == 1
    assert says in clipper.faults[0]


@pytest.mark.parametrize("layer", [Branches, Routes, Repeats])
def test_layers_that_vary_from_batch_to_batch(layer):
    network, data = made(lambda: Network(between=layer(0.1))), batch()
    clipper = GradientClipper(network, LOSS)
    for row in range(7):
        one, patient = (data[0][row : row + 1] * (1 - row), data[1][row : row + 1]), torch.tensor([row])
        total, norms, bound = patient_by_patient(network, LOSS, one, patient)
        assert_close(clipper(one, patient, bound), total, norms)


# What follows mixes the rows of the batch.


class BySorting(nn.Module):
    """Rows in the order of a statistic, as packed sequences have them, and back."""

    def __init__(self, statistic: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.statistic = nn.Linear(4, 4), statistic

    def forward(self, features):
        order = self.statistic(features).argsort()
        return self.layer(features[order])[order.argsort()]


class Moved(nn.Module):
    """Rows in other places of the batch, and back."""

    def __init__(self, there, back) -> None:
        super().__init__()
        self.layer, self.there, self.back = nn.Linear(4, 4), there, back

    def forward(self, features):
        return self.back(torch.tanh(self.layer(self.there(features))))


class Doubled(nn.Module):
    """All rows twice, one copy of the batch after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, features):
        first, second = torch.tanh(self.layer(torch.cat([features, features * 2]))).chunk(2)
        return first + second


class SlicesFirst(nn.Module):
    """Slices of all rows: slice 0 of each row, then slice 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, features):
        slices = features.unflatten(1, (2, 2)).transpose(0, 1)
        out = torch.tanh(self.layer(slices.flatten(0, 1)))
        return out.unflatten(0, (2, -1)).transpose(0, 1).flatten(1)


def gradient_only(x: Tensor) -> Tensor:
    mean = x.mean(0)
    return x + (mean - mean.detach())


def shifted(x: Tensor) -> Tensor:
    return torch.cat([x[:1], x[1:] - 0.5 * x[:-1]])


def in_large_batches(x: Tensor) -> Tensor:
    return x - x.mean(0) if len(x) > 3 else x


MIXERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(0),
    "mean, detached": lambda x: x - x.mean(0).detach(),
    "maximum": lambda x: x / x.abs().max(),
    "maximum, detached": lambda x: x / x.detach().abs().max(),
    "largest of each": lambda x: x - x.max(0).values,
    "sum": lambda x: x + 0.1 * x.sum(0, keepdim=True),
    "cumulative sum": lambda x: x.cumsum(0),
    "sum of what follows": lambda x: x.flip(0).cumsum(0).flip(0),
    "row before": shifted,
    "row after": lambda x: shifted(x.flip(0)).flip(0),
    "row after, detached": lambda x: torch.cat([x[:-1] - x[1:].detach(), x[-1:]]),
    "all but the first": lambda x: torch.cat([x[:1], x[1:] - x[1:].mean(0)]) if len(x) > 1 else x,
    "softmax": lambda x: x + x.softmax(0),
    "gradient only": gradient_only,
    "roll": lambda x: x.roll(1, 0),
    "roll by three": lambda x: x.roll(3, 0),
    "flip": lambda x: x + x.flip(0),
    "large batches": in_large_batches,
    "batch norm": lambda x: functional.batch_norm(x, None, None, training=True) if len(x) > 1 else x,
}


# Before the first layer there is no gradient to mix: that case is below.
MIXED = [(name, where) for name in MIXERS for where in PLACES if (name, where) != ("gradient only", "before")]


@pytest.mark.parametrize(("name", "where"), MIXED)
def test_networks_that_mix_rows(name, where):
    network = made(lambda: Network(**{where: MIXERS[name]}))
    assert_goes_the_slow_way(network, batch())


@pytest.mark.parametrize("name", sorted(set(MIXERS) - {"gradient only"}))
def test_the_trainers_probe_refuses_networks_that_mix_rows(name):
    network, (inputs, targets) = made(lambda: Network(before=MIXERS[name])), batch()
    with pytest.raises(ValueError, match="mixes patients"):
        require_independent_rows(lambda x, y: rows(network(x), y), inputs, targets)


def test_mixing_that_changes_nothing_is_right():
    assert_exact(made(lambda: Network(before=gradient_only)), batch(), PATIENTS, loss=LOSS)


class Mixer(nn.Module):
    """A layer that mixes rows in training and not in evaluation."""

    def forward(self, x):
        return x - x.mean(0) if self.training else x


@pytest.mark.parametrize("where", PLACES)
def test_a_network_that_mixes_rows_only_in_training(where):
    network, data = made(lambda: Network(**{where: Mixer()})), batch()
    clipper = GradientClipper(network, LOSS)
    for training in (False, True, False):
        network.train(training)
        total, norms, bound = patient_by_patient(network, LOSS, data, PATIENTS)
        assert_close(clipper(data, PATIENTS, bound), total, norms)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", ["roll by three", "large batches"])
def test_a_first_batch_of_few_rows_proves_nothing(name, where):
    network, (inputs, targets) = made(lambda: Network(**{where: MIXERS[name]})), batch()
    clipper = GradientClipper(network, LOSS)
    for count in (2, 7):
        data, patients = (inputs[:count], targets[:count]), PATIENTS[:count]
        total, norms, bound = patient_by_patient(network, LOSS, data, patients)
        assert_close(clipper(data, patients, bound), total, norms)


class ByShape(nn.Module):
    def forward(self, x):
        return x - x.mean(0) if x.shape[-1] > 6 else x


def test_a_network_that_mixes_rows_of_large_images_only():
    network = made(lambda: Network(before=ByShape()))
    clipper = GradientClipper(network, LOSS)
    for side in (6, 8, 6):
        data = batch((1, side, side))
        total, norms, bound = patient_by_patient(network, LOSS, data, PATIENTS)
        assert_close(clipper(data, PATIENTS, bound), total, norms)


MOVED = {
    "rolled": lambda: Moved(lambda x: x.roll(1, 0), lambda x: x.roll(-1, 0)),
    "rolled by three": lambda: Moved(lambda x: x.roll(3, 0), lambda x: x.roll(-3, 0)),
    "flipped": lambda: Moved(lambda x: x.flip(0), lambda x: x.flip(0)),
    "doubled": Doubled,
    "slices first": SlicesFirst,
    "sorted by mean": lambda: BySorting(lambda x: x.mean(1)),
    "sorted by mean, falling": lambda: BySorting(lambda x: -x.mean(1)),
    "sorted by first": lambda: BySorting(lambda x: x[:, 0]),
    "sorted by first, falling": lambda: BySorting(lambda x: -x[:, 0]),
    "sorted by length": lambda: BySorting(lambda x: x.square().sum(1)),
    "sorted by length, falling": lambda: BySorting(lambda x: -x.square().sum(1)),
}


@pytest.mark.parametrize("name", MOVED)
def test_networks_that_move_rows_to_other_places(name):
    assert_goes_the_slow_way(made(lambda: Network(between=MOVED[name]())), batch())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("where", PLACES)
def test_batch_norm_without_conversion(where, affine):
    norm = nn.BatchNorm2d(1, affine=affine) if where == "before" else nn.BatchNorm1d(4 if where == "between" else 2)
    if not affine:
        norm.requires_grad_(False)
    # Two rows a patient: batch norm does not take one vector alone.
    data, patients = batch(), torch.tensor([2, 0, 2, 1, 0, 1, 2])
    network = made(lambda: Network(**{where: norm})).train()
    assert_goes_the_slow_way(network, data, patients, says="batch norm mixes" if affine else "")


def rows(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    return rows(outputs, targets) + (outputs @ outputs.T).sum(1)


def hardest(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = rows(outputs, targets)
    return losses * (losses >= losses.median())


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda o, t: rows(o, t) - 0.5 * rows(o, t).mean(),
    "normalised": lambda o, t: rows(o, t) / rows(o, t).sum(),
    "normalised, detached": lambda o, t: rows(o, t) / rows(o, t).detach().sum(),
    "valid labels": lambda o, t: rows(o, t) * (t > 0) / (t > 0).sum().clamp(min=1),
    "class balance": lambda o, t: rows(o, t) / torch.bincount(t, minlength=2)[t],
    "contrastive": contrastive,
    "hardest": hardest,
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_mix_rows(name):
    assert_goes_the_slow_way(made(Network), batch(), SINGLE, loss=LOSSES[name])


def overlap_of_classes(outputs: Tensor, targets: Tensor) -> Tensor:
    """One number for each of two classes, over all rows: of two rows it looks like one number a row."""
    shares, wanted = outputs.softmax(1), functional.one_hot(targets, 2)
    return 1 - 2 * (shares * wanted).sum(0) / (shares + wanted).sum(0)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_loss_of_each_class_is_not_taken_for_one_of_each_row(count):
    network, (inputs, targets), patients = made(Network), batch(), SINGLE[:count]
    data = (inputs[:count] * 3, targets[:count])
    total, norms, bound = patient_by_patient(network, lambda o, t: overlap_of_classes(o, t).mean(), data, patients)
    try:
        found = GradientClipper(network, overlap_of_classes)(data, patients, bound)
    except ValueError as refusal:
        if "row" not in str(refusal):
            raise
    else:
        assert_close(found, total, norms)


# What follows is right in one pass, and has to be seen to be.


class Slices(nn.Module):
    """2.5D: all trained layers see the slices of all rows as one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3))
        self.score = nn.Linear(4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs):
        slices = inputs.transpose(1, 2).flatten(0, 1)
        features = self.body(slices).mean(dim=(2, 3)).unflatten(0, (len(inputs), -1))
        attention = self.score(torch.tanh(features)).softmax(1)
        return self.head((features * attention).sum(1))


@pytest.mark.parametrize("patients", [PATIENTS, SINGLE, torch.zeros(7, dtype=torch.int64)])
def test_merged_slices_are_exact(patients):
    assert_exact(made(Slices), batch((1, 3, 6, 6)), patients, loss=LOSS)
    assert_exact(made(Slices), batch((1, 3, 6, 6)), patients, loss=LOSS, max_physical_batch_size=2)


class Windows(nn.Module):
    """Windows merged into the batch, as Swin has them, in the order of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        windows = inputs.unfold(2, 2, 2).unfold(3, 2, 2).reshape(-1, 4)
        return self.head(torch.tanh(self.layer(self.norm(windows))).view(len(inputs), -1, 4).mean(1))


def test_merged_windows_are_exact():
    assert_exact(made(Windows), batch(), PATIENTS, loss=LOSS)


def zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class LowRank(nn.Module):
    """LoRA: a frozen layer and a product that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(4, 4).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), zeroed(nn.Linear(2, 4, bias=False))

    def forward(self, features):
        return self.whole(features) + self.up(self.down(features))


ZEROS = {
    "head": lambda: Network(between=nn.Sequential(nn.Tanh(), zeroed(nn.Linear(4, 4)), nn.Tanh())),
    "norm": lambda: Network(between=nn.Sequential(nn.Unflatten(1, (4, 1)), zeroed(nn.GroupNorm(2, 4)), nn.Flatten())),
    "low rank": lambda: Network(between=LowRank()),
    "convolution": lambda: Network(before=zeroed(nn.Conv2d(1, 1, 3, padding=1))),
}


@pytest.mark.parametrize("name", ZEROS)
def test_layers_that_start_at_zero_are_exact_and_fast(name):
    network = made(ZEROS[name])
    assert_exact(network, batch(), PATIENTS, loss=LOSS)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    assert_exact(network, batch(), PATIENTS, loss=LOSS)


def test_a_layer_that_starts_at_zero_hides_no_mixing():
    """The gradient stops at a head of zeros: only other weights show what is behind it."""
    network = made(lambda: Network(between=MIXERS["mean"]))
    zeroed(network.head)
    assert_goes_the_slow_way(network, batch())


def test_unused_and_frozen_parameters():
    network = made(lambda: Network(between=nn.Linear(4, 4)))
    network.unused = nn.Linear(3, 3).double()
    network.body.weight.requires_grad_(False)
    network.between.requires_grad_(False)
    clipper = assert_exact(network, batch(), PATIENTS, loss=LOSS)
    gradients = clipper(batch(), PATIENTS, 1.0).gradients
    assert [tuple(g.shape) for g in gradients] == [(4,), (2, 4), (2,), (3, 3), (3,)]
    assert not any(g.any() for g in gradients[3:])


def test_layers_that_are_frozen_later():
    network, data = made(Network), batch()
    clipper = GradientClipper(network, LOSS, method="one_pass")
    for trained in (True, False, True):
        network.body.requires_grad_(trained)
        total, norms, bound = patient_by_patient(network, LOSS, data, PATIENTS)
        assert_close(clipper(data, PATIENTS, bound), total, norms)


@pytest.mark.parametrize("method", ["auto", "one_pass", "microbatch"])
def test_nothing_to_train_gives_zero_norms(method):
    network = made(Network)
    unused = [nn.Parameter(torch.ones(3, dtype=torch.float64))]
    found = GradientClipper(network, LOSS, parameters=unused, method=method)(batch(), PATIENTS, 1.0)
    assert found.norms.tolist() == [0.0] * 4
    assert found.gradients[0].tolist() == [0.0] * 3


@pytest.mark.parametrize("method", ["auto", "one_pass", "microbatch"])
def test_an_empty_batch_gives_zeros_and_the_next_one_is_right(method):
    network, (inputs, targets) = made(Network), batch()
    clipper = GradientClipper(network, LOSS, method=method)
    nothing = clipper((inputs[:0], targets[:0]), PATIENTS[:0], 1.0)
    assert [g.shape for g in nothing.gradients] == [p.shape for p in network.parameters()]
    assert not flat(nothing.gradients).any()
    assert nothing.norms.shape == (0,)
    total, norms, bound = patient_by_patient(network, LOSS, (inputs, targets), PATIENTS)
    assert_close(clipper((inputs, targets), PATIENTS, bound), total, norms)


@settings(max_examples=60, deadline=None)
@given(
    patients=st.lists(st.integers(0, 4), min_size=1, max_size=10),
    gone=st.integers(0, 4),
    bound=st.sampled_from([1e-3, 0.7, 50.0]),
    exponents=st.lists(st.integers(-6, 30), min_size=10, max_size=10),
    microbatch=st.sampled_from([1, 3, None]),
    make=st.sampled_from([Network, Slices]),
)
def test_removing_a_patient_moves_the_sum_by_at_most_the_bound(patients, gone, bound, exponents, microbatch, make):
    torch.manual_seed(0)
    network, index = make(), torch.tensor(patients)
    shape = (1, 6, 6) if make is Network else (1, 2, 6, 6)
    inputs = torch.randn(len(patients), *shape)
    inputs *= 10.0 ** torch.tensor(exponents[: len(patients)]).reshape(-1, *[1] * len(shape))
    targets, kept = torch.arange(len(patients)) % 2, index != gone
    clipper = GradientClipper(network, LOSS)

    def total(rows: Tensor) -> Tensor:
        found = clipper((inputs[rows], targets[rows]), index[rows], bound, max_physical_batch_size=microbatch)
        return flat(found.gradients).double()

    assert float((total(torch.ones_like(kept)) - total(kept)).norm()) <= bound * (1 + 1e-4)
    assert all("max_physical_batch_size" in fault for fault in clipper.faults)


def test_the_question_to_the_network_takes_some_fifteen_steps_once_for_batches_of_about_a_size_and_is_told_once(caplog):
    network, calls = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), []
    network.register_forward_hook(lambda *_: calls.append(1))
    clipper = GradientClipper(network, nn.CrossEntropyLoss())

    def asked(rows: int) -> int:
        calls.clear()
        batch = torch.randn(rows, 3), torch.zeros(rows, dtype=torch.int64)
        with caplog.at_level("INFO", "monai_privacy"):
            clipper(batch, torch.arange(rows), 1.0)
        return len(calls) - 1

    for rows, same in ((3, (3,)), (4, ()), (5, ()), (6, ()), (7, ()), (8, (9, 15)), (16, (31,)), (32, (33, 70))):
        assert asked(rows) == 17  # two of them end at the loss, as the labels -1 and 255 are not taken
        assert [asked(other) for other in same] == [0] * len(same)
    (message,) = caplog.messages
    assert "some fifteen steps of at most 32 images" in message  # and not how many patients were drawn


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation gave."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.nbytes = max(
            [self.nbytes, *(t.untyped_storage().nbytes() for t in tree_leaves(made) if torch.is_tensor(t))]
        )
        return made


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_the_question_to_the_network_makes_nothing_larger_than_the_network_does(rows):
    network, seen = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AvgPool2d(62), nn.Flatten(), nn.Linear(16, 2)), []
    network.register_forward_hook(lambda _, __, outputs: seen.append(len(outputs)))
    clipper, inputs = GradientClipper(network, LOSS), torch.randn(rows, 1, 64, 64)
    with _Largest() as made:
        clipper((inputs, torch.arange(rows) % 2), torch.arange(rows), 1.0)
    another_number = {2: 3, 8: 9}.get(rows, rows - 1)  # the answer for eight rows stands for up to fifteen
    assert set(seen) == {rows, another_number}
    assert made.nbytes == max(rows, another_number) * 16 * 62 * 62 * 4  # the convolution's output, in float32
    assert clipper.faults == ()
