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

"""Networks, losses and callers made to break the bound: each is exact all the same, or refused."""

from __future__ import annotations

import math

import pytest
import torch
from test_clipping_operations import Forced, assert_close, flat, patient_by_patient
from torch import nn
from torch.nn import functional

from monai_privacy.mechanisms.clipping import GradientClipper
from monai_privacy.networks import check_network

ALONE = torch.arange(6)
LOSS = nn.CrossEntropyLoss()


def moves(clipper, data, patients, bound, **options):
    """How far the sum goes when the first patient leaves."""
    rest = patients != patients[0]
    everybody = clipper(data, patients, bound, **options)
    others = clipper((data[0][rest], data[1][rest]), patients[rest], bound, **options)
    return float((flat(everybody.gradients) - flat(others.gradients)).norm())


class Two(nn.Module):
    """Two layers and something in between."""

    def __init__(self, between=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.between = nn.Linear(4, 4), nn.Linear(4, 2), between
        self.double()

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.second(x if self.between is None else self.between(x))


def batch(rows=6):
    torch.manual_seed(1)
    return torch.randn(rows, 4, dtype=torch.float64), torch.arange(rows) % 2


def assert_exact_now(clipper, network, data, loss=LOSS):
    total, norms, bound = patient_by_patient(network, loss, data, ALONE[: len(data[0])])
    assert_close(clipper(data, ALONE[: len(data[0])], bound), total, norms)


@pytest.mark.parametrize(
    "network", [nn.Sequential(nn.Embedding(5, 4, max_norm=0.1)), nn.EmbeddingBag(5, 4, max_norm=0.1)]
)
def test_a_layer_that_rescales_its_weights(network):
    assert [problem.kind for problem in check_network(network)] == ["max_norm"]


def test_a_network_that_writes_into_its_weights():
    network = Two()
    network.between = lambda x: (network.frozen.add_(x.detach().mean()), x)[1]
    network.frozen = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)
    with pytest.raises(ValueError, match="writes into its own parameters"):
        GradientClipper(network, LOSS)(batch(), ALONE, 1.0)


@pytest.mark.parametrize("method", ["auto", "microbatch"])
def test_a_network_that_makes_a_layer_of_what_it_sees(method):
    def learnt(x):
        network.found = nn.ParameterList([nn.Parameter(x.detach().mean(0), requires_grad=False)])
        return x

    network = Two(learnt)
    with pytest.raises(ValueError, match="writes into its own parameters"):
        GradientClipper(network, LOSS, method=method)(batch(), ALONE, 1.0)


POSITIONS = torch.tensor([1e12, 3e4, -1e12, -3e4])
LAYERS = {
    "linear": (lambda: nn.Linear(256, 256, bias=False), (4, 256), (4, 1)),
    "convolution": (lambda: nn.Conv2d(256, 256, 1, bias=False), (256, 2, 2), (1, 2, 2)),
}


@pytest.mark.parametrize("repeatable", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_terms_that_cancel_in_the_norm_and_not_in_the_sum(name, repeatable):
    make, shape, positions = LAYERS[name]
    torch.manual_seed(0)
    network, inputs = make(), torch.randn(8, *shape)
    inputs[0] = POSITIONS.reshape(positions)
    clipper = GradientClipper(network, lambda o, t: o.flatten(1).sum(1), repeatable=repeatable)
    assert moves(clipper, (inputs, torch.zeros(8)), torch.arange(8), 1.0) <= 1.001


def test_words_that_cancel():
    torch.manual_seed(0)
    network, words = nn.Embedding(5000, 16), torch.randint(0, 5000, (8, 4))
    words[0] = 7
    scale = torch.ones(8, 4)
    scale[0] = POSITIONS

    def loss(outputs, targets):
        return (outputs.sum(2) * targets).sum(1)

    clipper = GradientClipper(network, loss, repeatable=True)
    assert moves(clipper, (words, scale), torch.arange(8), 1.0) <= 1.001


def test_terms_that_are_not_finite_in_the_sum_alone():
    network, inputs = nn.Linear(256, 256, bias=False), torch.randn(8, 4, 256)
    inputs[0] = 1e30

    def loss(outputs, targets):
        return (outputs * targets[:, :, None]).flatten(1).sum(1)

    weights = torch.ones(8, 4)
    weights[0] = torch.tensor([1e10, -1e10, 0.0, 0.0])
    found = GradientClipper(network, loss, repeatable=True)((inputs, weights), torch.arange(8), 1.0)
    assert torch.isfinite(flat(found.gradients)).all()


def mixed(x):
    return x - x.mean(0)


class Switched(nn.Module):
    """Mixes the rows in training, or where it is told to."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x):
        return mixed(x) if self.training else x


def test_a_part_that_is_set_to_training_later():
    network = Two(Switched())
    clipper = GradientClipper(network, LOSS)
    network.between.eval()
    assert_exact_now(clipper, network, batch())
    network.between.train()
    assert_exact_now(clipper, network, batch())
    assert clipper.faults


def test_a_layer_that_is_put_in_later():
    network = Two(nn.Identity())
    clipper = GradientClipper(network, LOSS)
    assert_exact_now(clipper, network, batch())
    network.between = nn.BatchNorm1d(4, affine=False).double()
    # One patient at a time, which this layer does not take.
    with pytest.raises(ValueError, match="more than 1 value"):
        clipper(batch(), ALONE, 1.0)


def test_another_forward_later():
    network = Two()
    clipper = GradientClipper(network, LOSS)
    clipper(batch(), ALONE, 1.0, forward=lambda inputs, rows: network(inputs))
    slow = GradientClipper(network, LOSS, method="microbatch")
    found = [c(batch(), ALONE, 0.1, forward=lambda inputs, rows: network(mixed(inputs))) for c in (clipper, slow)]
    assert_close(found[0], flat(found[1].gradients), found[1].norms)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_of_another_shape_later():
    network = nn.Sequential(Two(), nn.Linear(2, 1).double())
    clipper = GradientClipper(network, nn.MSELoss())
    inputs, targets = batch()
    assert_exact_now(clipper, network, (inputs, targets[:, None].double()), nn.MSELoss())
    # Against (B, 1) outputs these are broadcast to (B, B).
    found = clipper((inputs, targets.double()), ALONE, 0.1)
    slow = GradientClipper(network, nn.MSELoss(), method="microbatch")((inputs, targets.double()), ALONE, 0.1)
    assert_close(found, flat(slow.gradients), slow.norms)


LOOKING = {
    "by chance": lambda x: mixed(x) if torch.rand(()) < 0.3 else x,
    "bool": lambda x: mixed(x) if x.abs().max() > 1 else x,
    "item": lambda x: mixed(x) if x.abs().max().item() > 1 else x,
    "float": lambda x: x / max(1.0, float(x.abs().max())),
    "tolist": lambda x: mixed(x) if x.abs().max().tolist() > 1 else x,
    "numpy": lambda x: mixed(x) if x.detach().abs().max().numpy() > 1 else x,
}


@pytest.mark.parametrize("name", LOOKING)
def test_networks_that_decide_by_numbers(name):
    network, (inputs, targets) = Two(LOOKING[name]), batch()
    clipper = GradientClipper(network, LOSS)
    for scale in (1.0, 0.01, 100.0):
        torch.manual_seed(int(scale))
        # In the fast way no number is another than in the probe; those of chance fall as they fall.
        clipper((inputs * scale, targets), ALONE, 0.1, forward=lambda some, rows: network.second(LOOKING[name](some)))
    assert name == "by chance" or clipper.faults


class Positions(nn.Module):
    """A sinusoid a row, as where the batch comes first by mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.sin(torch.arange(400.0)).reshape(100, 4).double())

    def forward(self, x):
        return x + self.table[: len(x)]


PLACES = {
    "positions": Positions(),
    "number of rows": lambda x: x * (1 + len(x) % 2),
    "share of the rows": lambda x: x / len(x),
    "dropout behind": nn.Sequential(Positions(), nn.Dropout(0.5)),
}


def behind(most):
    """What the first rows left goes into those beyond ``most``, as where a network takes so many at a time."""
    return lambda x: x if len(x) <= most else torch.cat([x[:most], x[most:] + x[: len(x) - most]])


@pytest.mark.parametrize(("most", "draws"), [(8, (8, 15)), (8, (9,)), (16, (16, 20)), (32, (64,)), (4, (4, 5))])
def test_rows_beyond_so_many_at_a_time(most, draws):
    network = Two(behind(most))
    clipper = GradientClipper(network, LOSS)
    for rows in draws:
        data, patients = batch(rows), torch.arange(rows)
        total, norms, bound = patient_by_patient(network, LOSS, data, patients)
        if rows <= most:
            assert_close(clipper(data, patients, bound), total, norms)
        else:
            clipper(data, patients, bound)
            assert clipper.faults


def test_complex_parameters_are_refused():
    network = nn.Sequential(nn.Linear(4, 2, dtype=torch.complex64))
    inputs, targets = torch.randn(3, 4, dtype=torch.complex64), torch.zeros(3)
    for method in ("auto", "microbatch"):
        clipper = GradientClipper(network, lambda y, t: y.abs().sum(1) - t, method=method)
        with pytest.raises(ValueError, match="complex"):
            clipper((inputs, targets), torch.arange(3), 1.0)


@pytest.mark.parametrize("name", PLACES)
def test_rows_that_depend_on_their_place(name):
    network = Two(PLACES[name])
    clipper = GradientClipper(network, LOSS)
    clipper(batch(), ALONE, 0.1)
    assert "place in the batch" in clipper.faults[0]


def test_dropout_is_no_fault():
    clipper = GradientClipper(Two(nn.Dropout(0.5)), LOSS)
    clipper(batch(), ALONE, 0.1)
    assert clipper.faults == ()


@pytest.mark.parametrize("missing", [-1.0, 255.0, math.nan])
def test_losses_over_the_labels_that_are_there(missing):
    def loss(outputs, targets):
        valid = ~targets.isnan() if math.isnan(missing) else targets != missing
        rows = functional.binary_cross_entropy_with_logits(outputs, targets.nan_to_num(0).clamp(0, 1), reduction="none")
        return (rows * valid).sum(1) / valid.sum().clamp(min=1)

    network, (inputs, _) = Two(), batch()
    targets = torch.ones(6, 2, dtype=torch.float64)
    clipper = GradientClipper(network, loss)
    clipper((inputs, targets), ALONE, 0.1)
    assert clipper.faults


@pytest.mark.parametrize(
    ("missing", "dtype"),
    [
        *[(label, torch.float64) for label in (-1.0, 255.0, -100.0, math.nan)],
        *[(label, dtype) for label in (-1, -100, 255) for dtype in (torch.int64, torch.int32, torch.int16)],
        *[(-1, torch.int8), (-100, torch.int8), (255, torch.uint8), (156, torch.uint8), (True, torch.bool)],
        (math.nan, torch.float16),
    ],
)
def test_losses_by_the_number_of_labels_that_are_not_there(missing, dtype):
    """None of the synthetic ones, or as many of the first row twice, so that only another label shows it."""

    def loss(outputs, targets):
        gone = targets.isnan() if math.isnan(missing) else targets == missing
        wanted = targets.to(outputs.dtype).nan_to_num(0).clamp(0, 1)
        rows = functional.binary_cross_entropy_with_logits(outputs, wanted, reduction="none")
        return rows.sum(1) / (1 + gone.sum())

    clipper = GradientClipper(Two(), loss)
    clipper((batch()[0], torch.ones(6, 2).to(dtype)), ALONE, 0.1)
    assert "depend on several rows" in clipper.faults[0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16])
def test_labels_of_any_type_are_no_fault(dtype):
    def loss(outputs, targets):
        return functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none").sum(1)

    clipper = GradientClipper(Two(), loss)
    clipper((batch()[0], torch.ones(6, 2).to(dtype)), ALONE, 0.1)
    assert clipper.faults == ()


def test_an_outlier_that_leaks_little():
    network = nn.Sequential(Two())
    network[0].between = lambda x: x + 1e-6 * x.mean(0)
    clipper = GradientClipper(network, LOSS)
    clipper(batch(), ALONE, 0.1, forward=lambda inputs, rows: network[0].second(inputs + 1e-6 * inputs.mean(0)))
    assert clipper.faults


def test_a_network_that_takes_no_other_rows():
    def strict(x):
        torch._assert_async(x.detach().abs().amax() < 5)
        return mixed(x)

    network = Two()
    clipper = GradientClipper(network, LOSS)
    clipper(batch(), ALONE, 0.1, forward=lambda inputs, rows: network(strict(inputs)))
    assert clipper.faults


class Transposed(nn.Module):
    """Its layers see positions for rows; six positions and six rows look alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x.transpose(0, 1)))).transpose(0, 1).mean(1)


def test_opacus_is_asked_whose_rows_are_whose():
    network, inputs = Transposed(), torch.randn(6, 6, 4)
    with pytest.raises(ValueError, match="method is 'opacus'"):
        GradientClipper(network, LOSS, method="opacus")((inputs, torch.arange(6) % 2), ALONE, 0.1)


def test_an_observer_that_writes_over_what_it_is_shown():
    network, data = Two(), batch()
    network.between = lambda x: x * 1
    total, norms, bound = patient_by_patient(network, LOSS, data, ALONE)
    shown = []

    def forward(inputs, rows):
        shown.append(torch.tanh(network.first(inputs)))
        return network.second(shown[-1])

    clipper = GradientClipper(network, LOSS, repeatable=True)
    found = clipper(data, ALONE, bound, forward=forward, observe=lambda o, r: shown[-1].detach().mul_(100))
    assert_close(found, total, norms)


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mul_(1000.0)


def test_a_gradient_that_is_written_over():
    """The layer that is heard first has the very tensor that the next function writes over."""
    torch.manual_seed(0)
    kept, scaled = nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)
    network = nn.ModuleList([scaled, kept])
    inputs = torch.randn(4, 2, 256)

    def forward(some, rows):
        return InPlace.apply(scaled(some * 1e-6)) + kept(some)

    clipper = GradientClipper(network, lambda o, t: o.square().flatten(1).sum(1))
    clipper._chooser = Forced("gram")
    with pytest.raises(ValueError, match="written over"):
        clipper((inputs, torch.zeros(4)), torch.arange(4), 1e-3, forward=forward)


def test_a_frozen_weight_that_is_made_of_the_batch():
    network = Two()
    network.made = nn.Parameter(torch.zeros(2, 4, dtype=torch.float64), requires_grad=False)
    weight = torch.zeros(2, 4, dtype=torch.float64)

    def forward(inputs, rows):
        features = torch.tanh(network.first(inputs))
        weight.copy_(features.detach().mean(0).expand(2, 4))
        return functional.linear(features, weight, network.second.bias)

    clipper = GradientClipper(network, LOSS, parameters=[*network.first.parameters(), network.second.bias])
    slow = GradientClipper(
        network, LOSS, parameters=[*network.first.parameters(), network.second.bias], method="microbatch"
    )
    found, expected = (c(batch(), ALONE, 0.1, forward=forward) for c in (clipper, slow))
    assert_close(found, flat(expected.gradients), expected.norms)


@pytest.mark.parametrize("shape", [(6, 1), (1,), (3,), ()])
def test_weights_of_another_shape(shape):
    with pytest.raises(ValueError, match="row_weights has shape"):
        GradientClipper(Two(), LOSS)(batch(), ALONE, 1.0, row_weights=torch.ones(shape))


@pytest.mark.parametrize("bound", [-1.0, math.nan, math.inf])
def test_bounds_that_bound_nothing(bound):
    with pytest.raises(ValueError, match="max_grad_norm"):
        GradientClipper(Two(), LOSS)(batch(), ALONE, bound)


def test_no_rows_in_a_call():
    with pytest.raises(ValueError, match="max_physical_batch_size"):
        GradientClipper(Two(), LOSS)(batch(), ALONE, 1.0, max_physical_batch_size=-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(dtype):
    network = Two().to(dtype)
    with pytest.raises(ValueError, match="Keep parameters in float32"):
        GradientClipper(network, LOSS)((batch()[0].to(dtype), batch()[1]), ALONE, 1.0)
