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

"""Every operation that the fast method hears, by every method that it offers: the same numbers as plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import Tensor, UntypedStorage, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from monai_privacy.mechanisms.clipping import ClippedGradientSum, GradientClipper
from monai_privacy.mechanisms.clipping.choosing import MemoryBudget, MethodChooser
from monai_privacy.mechanisms.clipping.chunk import chunks
from monai_privacy.mechanisms.clipping.convolution import ConvolutionRule
from monai_privacy.mechanisms.clipping.materials import UnitGradients
from monai_privacy.mechanisms.clipping.onednn import has_onednn, onednn_products
from monai_privacy.mechanisms.clipping.operation import NormMethod
from monai_privacy.mechanisms.clipping.precision import full_precision
from monai_privacy.mechanisms.clipping.unfolding import Unfolding
from monai_privacy.mechanisms.clipping.units import Units
from monai_privacy.networks import FoldedBatchNorm

EXACT = 1e-12
GROUPINGS = {
    "one row a patient": [4, 0, 5, 1, 3, 2],
    "two rows a patient": [2, 0, 1, 0, 2, 1],
    "unequal, unsorted": [7, 1, 7, 0, 1, 2],
}


class Forced(MethodChooser):
    """Takes the named method wherever it is offered, whatever it costs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self.times_used = 0
        self.offered: set[str] = set()

    def collect(self, number, signature, methods, *rest):
        candidates = methods()
        self.offered |= {method.name for method in candidates}
        chosen = [method for method in candidates if method.name == self._name]
        self.times_used += len(chosen)
        return super().collect(number, signature, lambda: chosen or candidates, *rest)


def row_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """A smooth loss for each row of outputs of any shape."""
    return (outputs.flatten(1) + 0.3).square().sum(1) * (1.0 + targets)


def flat(gradients) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def patient_by_patient(
    network: nn.Module,
    loss: Callable,
    batch: tuple[Tensor, Tensor],
    patients: Tensor,
    bound: float | None = None,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, float]:
    """The definition, by plain autograd: sum, norms and bound; the mean norm where no bound is given."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = []
    for patient in patients.unique():
        rows = (patients == patient).nonzero()[:, 0]
        outputs = network(batch[0][rows])
        total = torch.zeros(())
        for at, row in enumerate(rows):
            one = loss(outputs[at : at + 1], batch[1][row : row + 1]).sum()
            total = total + (one if row_weights is None else one * row_weights[row])
        found = torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else ()
        found = found or [None] * len(parameters)
        gradients.append(flat(torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)))
    norms = torch.stack([gradient.double().norm() for gradient in gradients])
    bound = float(norms.mean()) if bound is None else bound
    factors = (bound / norms.clamp(min=1e-300)).clamp(max=1.0)
    return sum(g * f for g, f in zip(gradients, factors, strict=True)), norms, bound


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def assert_close(found: ClippedGradientSum, total: Tensor, norms: Tensor, tolerance: float = EXACT) -> None:
    assert len(found.norms) == len(norms)
    gap = (found.norms - norms).abs()
    # A patient without gradient has norm zero to rounding.
    assert float((gap / norms.clamp(min=1e-9 * float(norms.max()) + 1e-300)).max()) < tolerance
    assert error(flat(found.gradients), total) < tolerance


def assert_exact(
    network: nn.Module,
    batch: tuple[Tensor, Tensor],
    patients: Tensor,
    *,
    loss: Callable = row_losses,
    chooser: MethodChooser | None = None,
    faults: str = "",
    tolerance: float = EXACT,
    **options,
) -> GradientClipper:
    """The clipper's sum and norms are those of plain autograd and of the slow method, by the expected path."""
    total, norms, bound = patient_by_patient(network, loss, batch, patients, row_weights=options.get("row_weights"))
    slow = GradientClipper(network, loss, method="microbatch")(batch, patients, bound, **options)
    assert_close(slow, total, norms, tolerance)
    clipper = GradientClipper(network, loss)
    if chooser is not None:
        clipper._chooser = chooser
    assert_close(clipper(batch, patients, bound, **options), total, norms, tolerance)
    if faults:
        assert clipper.faults
        assert faults in clipper.faults[0]
    else:
        assert clipper.faults == ()
    return clipper


class Wrapped(nn.Module):
    """The layers under test behind a trained one, whose gradient passes through them; a smooth end."""

    def __init__(self, layers: nn.Module, channels: int) -> None:
        super().__init__()
        self.before = FoldedBatchNorm(channels)
        self.layers = layers

    def forward(self, inputs):
        return torch.tanh(self.layers(self.before(inputs)))


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return self.layer(torch.tanh(self.layer(inputs)))


class BothWays(nn.Module):
    """A layer on an image and on the same, turned round."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return self.layer(inputs) + torch.tanh(self.layer(inputs.flip(-1)))


class TiedTransposed(nn.Module):
    """A convolution and its transpose that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose1d(8, 6, 3, stride=2, padding=1)
        self.up.weight = self.down.weight

    def forward(self, inputs):
        return self.up(torch.tanh(self.down(inputs)))


class TiedWords(nn.Module):
    """A language model that reads and writes with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Embedding(7, 5)
        self.body = nn.Linear(5, 5)
        self.write = nn.Linear(5, 7, bias=False)
        self.write.weight = self.read.weight

    def forward(self, words):
        return torch.tanh(self.write(torch.tanh(self.body(self.read(words)))))


class PaddingFromTheEnd(nn.Module):
    """A padding index that nn.Embedding would have made positive."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, words):
        return functional.embedding(words, self.weight, padding_idx=-1)


class TwiceInAnotherShape(nn.Module):
    """One weight on rows and on slices of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        slices = self.layer(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        return self.layer(torch.tanh(slices.mean(1)))


class TwoRoles(nn.Module):
    """One parameter that is a weight here and a bias there, and both in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, inputs):
        normed = functional.group_norm(inputs, 2, self.both, self.both)
        return functional.linear(normed.mean(2), self.weight, self.both)


class Inplace(nn.Module):
    """In-place activations and a residual +=, as MONAI's networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, inputs):
        features = functional.relu_(self.norm(self.first(inputs)))
        out = self.second(features)
        out += inputs
        return functional.elu_(out)


def frozen(layer: nn.Module, name: str) -> nn.Module:
    getattr(layer, name).requires_grad_(False)
    return layer


def slopes(layer: nn.PReLU) -> nn.PReLU:
    nn.init.uniform_(layer.weight, 0.1, 0.5)
    return layer


@dataclass(frozen=True)
class Case:
    """Layers, the shape of a row of their input, and the methods that the engine offers for them.

    Args:
        make: makes them.
        shape: of one row, channels first.
        methods: by name; "" where there is only one way.
        words: size of the vocabulary where inputs are integers.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    methods: tuple[str, ...] = ("",)
    words: int = 0

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        network = (self.make() if self.words else Wrapped(self.make(), self.shape[0])).double()
        # Weights and biases that start at ones and zeros would hide mistakes.
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return network

    def batch(self, rows: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        if self.words:
            inputs = torch.randint(0, self.words, (rows, *self.shape), generator=generator)
        else:
            inputs = torch.randn((rows, *self.shape), generator=generator, dtype=torch.float64)
            inputs *= torch.linspace(0.2, 2.0, rows, dtype=torch.float64).reshape(-1, *[1] * len(self.shape))
        return inputs, torch.arange(rows) % 2


LOOPS = ("loop", "loop, norms", "grouped", "grouped, norms")
DENSE = (*LOOPS, "unfold", "unfold, norms")
CONVOLUTION = (*DENSE, "gram")
IN_GROUPS = TRANSPOSED = (*LOOPS, "gram")
PRODUCTS = ("product", "product, norms")
POINTWISE = (*LOOPS, *PRODUCTS, "gram")
LINEAR = ("product", "gram")
EMBEDDING = ("scatter", "equal words")

CASES = {
    "conv1d": Case(lambda: nn.Conv1d(6, 8, 3), (6, 6), CONVOLUTION),
    "conv1d, stride 3, padding 2": Case(lambda: nn.Conv1d(6, 20, 3, stride=3, padding=2), (6, 7), CONVOLUTION),
    "conv1d, kernel 4, dilation 2": Case(lambda: nn.Conv1d(6, 10, 4, dilation=2), (6, 9), CONVOLUTION),
    "conv1d, same": Case(lambda: nn.Conv1d(6, 10, 3, padding="same"), (6, 5), CONVOLUTION),
    "conv1d, same, even kernel": Case(lambda: nn.Conv1d(6, 10, 2, padding="same", dilation=2), (6, 4), CONVOLUTION),
    "conv1d, groups": Case(lambda: nn.Conv1d(8, 24, 3, groups=2), (8, 5), IN_GROUPS),
    "conv2d": Case(lambda: nn.Conv2d(4, 12, 2), (4, 3, 3), CONVOLUTION),
    "conv2d, stride 2": Case(lambda: nn.Conv2d(4, 32, 3, stride=2, padding=1), (4, 3, 4), CONVOLUTION),
    "conv2d, stride (2, 1)": Case(lambda: nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 0)), (2, 5, 4), DENSE),
    "conv2d, pixels left over": Case(lambda: nn.Conv2d(4, 24, 2, stride=3), (4, 6, 4), CONVOLUTION),
    "conv2d, dilation (2, 1)": Case(lambda: nn.Conv2d(4, 12, 2, dilation=(2, 1)), (4, 4, 2), CONVOLUTION),
    "conv2d, same": Case(lambda: nn.Conv2d(4, 16, 3, padding="same"), (4, 2, 2), CONVOLUTION),
    "conv2d, valid": Case(lambda: nn.Conv2d(4, 12, 2, padding="valid"), (4, 3, 2), CONVOLUTION),
    "conv2d, bias-free": Case(lambda: nn.Conv2d(4, 12, 2, bias=False), (4, 3, 2), CONVOLUTION),
    "conv2d, groups": Case(lambda: nn.Conv2d(6, 36, 2, groups=3), (6, 2, 3), IN_GROUPS),
    "conv2d, depthwise": Case(lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 5, 4), LOOPS),
    "conv2d, depthwise times 12": Case(lambda: nn.Conv2d(2, 24, 2, groups=2), (2, 2, 3), IN_GROUPS),
    "conv2d, reflect": Case(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 5), DENSE),
    "conv2d, circular": Case(lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 5), DENSE),
    "conv2d, replicate": Case(lambda: nn.Conv2d(4, 24, 2, padding=1, padding_mode="replicate"), (4, 2, 1), CONVOLUTION),
    "conv2d, pointwise": Case(lambda: nn.Conv2d(8, 12, 1), (8, 2, 2), POINTWISE),
    "conv2d, pointwise, stride 2": Case(lambda: nn.Conv2d(6, 24, 1, stride=(2, 1)), (6, 4, 2), POINTWISE),
    "conv2d, pointwise, padding": Case(lambda: nn.Conv2d(2, 3, 1, padding=1), (2, 2, 2), DENSE),
    "conv2d, pointwise, groups": Case(lambda: nn.Conv2d(16, 24, 1, groups=2), (16, 2, 2), IN_GROUPS),
    "conv3d": Case(lambda: nn.Conv3d(4, 12, 2), (4, 2, 3, 2), CONVOLUTION),
    "conv3d, all": Case(
        lambda: nn.Conv3d(4, 96, (3, 2, 2), stride=(2, 1, 1), padding=(1, 0, 0), dilation=(1, 1, 2), groups=2),
        (4, 3, 2, 3),
        IN_GROUPS,
    ),
    "conv3d, circular": Case(lambda: nn.Conv3d(2, 2, 3, padding=1, padding_mode="circular"), (2, 3, 3, 2), DENSE),
    "conv3d, pointwise": Case(lambda: nn.Conv3d(8, 12, 1), (8, 2, 1, 2), POINTWISE),
    "conv_transpose1d": Case(lambda: nn.ConvTranspose1d(24, 8, 3), (24, 3), TRANSPOSED),
    "conv_transpose1d, dilation": Case(lambda: nn.ConvTranspose1d(24, 8, 2, dilation=2), (24, 3), TRANSPOSED),
    "conv_transpose2d": Case(lambda: nn.ConvTranspose2d(16, 4, 2, stride=2), (16, 1, 2), TRANSPOSED),
    "conv_transpose2d, output padding": Case(
        lambda: nn.ConvTranspose2d(24, 3, 3, stride=2, padding=1, output_padding=1), (24, 3, 2), TRANSPOSED
    ),
    "conv_transpose1d, output padding": Case(
        lambda: nn.ConvTranspose1d(40, 8, 3, stride=2, padding=1, output_padding=1), (40, 3), TRANSPOSED
    ),
    "conv_transpose1d, groups": Case(lambda: nn.ConvTranspose1d(48, 8, 3, groups=2), (48, 3), TRANSPOSED),
    "conv_transpose2d, groups": Case(
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), groups=2, bias=False), (4, 2, 3), LOOPS
    ),
    "conv_transpose3d": Case(lambda: nn.ConvTranspose3d(32, 2, 2, stride=2), (32, 1, 2, 1), TRANSPOSED),
    "linear": Case(lambda: nn.Linear(5, 4), (5,), LINEAR),
    "linear, bias-free": Case(lambda: nn.Linear(5, 4, bias=False), (5,), LINEAR),
    "linear on 3 dimensions": Case(lambda: nn.Linear(5, 4), (3, 5), LINEAR),
    "linear on 4 dimensions": Case(lambda: nn.Linear(5, 4), (2, 3, 5), LINEAR),
    "group norm": Case(lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "group norm of one group": Case(lambda: nn.GroupNorm(1, 4), (4, 5)),
    "group norm of one channel": Case(lambda: nn.GroupNorm(1, 1), (1, 3, 3)),
    "group norm on vectors": Case(lambda: nn.GroupNorm(2, 8), (8,)),
    "instance norm 1d": Case(lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "instance norm 2d": Case(lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 3)),
    "instance norm 3d": Case(lambda: nn.InstanceNorm3d(4, affine=True), (4, 2, 3, 2)),
    "layer norm": Case(lambda: nn.LayerNorm(6), (4, 6)),
    "layer norm on vectors": Case(lambda: nn.LayerNorm(6), (6,)),
    "layer norm of two dimensions": Case(lambda: nn.LayerNorm([3, 4]), (2, 3, 4)),
    "layer norm without bias": Case(lambda: nn.LayerNorm([2, 3, 4], bias=False), (2, 3, 4)),
    "folded batch norm": Case(lambda: FoldedBatchNorm(4), (4, 3, 3)),
    "folded batch norm on vectors": Case(lambda: FoldedBatchNorm(4), (4,)),
    "embedding": Case(lambda: nn.Embedding(5, 4), (6,), EMBEDDING, words=5),
    "embedding, padding": Case(lambda: nn.Embedding(5, 4, padding_idx=2), (6,), EMBEDDING, words=5),
    "embedding, padding from the end": Case(PaddingFromTheEnd, (6,), EMBEDDING, words=5),
    "embedding of pictures": Case(lambda: nn.Embedding(5, 3), (2, 3), EMBEDDING, words=5),
    "embedding of one word": Case(lambda: nn.Embedding(5, 3), (), EMBEDDING, words=5),
    "prelu": Case(lambda: slopes(nn.PReLU()), (4, 3, 3)),
    "prelu of channels": Case(lambda: slopes(nn.PReLU(4)), (4, 3, 3)),
    "prelu on vectors": Case(lambda: slopes(nn.PReLU(4)), (4,)),
    "conv used twice": Case(lambda: Twice(nn.Conv1d(6, 6, 3, padding=1)), (6, 5), ("loop", "grouped", "unfold")),
    "conv to fewer channels": Case(lambda: nn.Conv2d(8, 2, (3, 2), padding=1, dilation=(1, 2)), (8, 5, 4), DENSE),
    "conv to fewer channels used twice": Case(
        lambda: BothWays(nn.Conv2d(6, 2, (3, 2), padding=(1, 0))), (6, 6, 5), ("loop", "grouped", "unfold")
    ),
    "pointwise used twice": Case(lambda: Twice(nn.Conv2d(6, 6, 1)), (6, 2, 2), ("loop", "grouped", "product")),
    "transposed used twice": Case(lambda: Twice(nn.ConvTranspose1d(6, 6, 3)), (6, 4), ("loop", "grouped")),
    "linear used twice": Case(lambda: Twice(nn.Linear(5, 5)), (3, 5), ("product",)),
    "group norm used twice": Case(lambda: Twice(nn.GroupNorm(2, 4)), (4, 5)),
    "layer norm used twice": Case(lambda: Twice(nn.LayerNorm(5)), (4, 5)),
    "prelu used twice": Case(lambda: Twice(slopes(nn.PReLU(4))), (4, 5)),
    "conv and transpose tied": Case(TiedTransposed, (6, 5), ("loop", "grouped", "unfold")),
    "embedding and linear tied": Case(TiedWords, (4,), ("scatter", "product", "gram"), words=7),
    "rows and slices": Case(TwiceInAnotherShape, (3, 4), ("product",)),
    "weight and bias in one": Case(TwoRoles, (4, 3), LINEAR),
    "conv, weight frozen": Case(lambda: frozen(nn.Conv2d(4, 3, 2), "weight"), (4, 3, 3)),
    "conv, bias frozen": Case(lambda: frozen(nn.Conv2d(4, 12, 2), "bias"), (4, 3, 3), CONVOLUTION),
    "transposed, weight frozen": Case(lambda: frozen(nn.ConvTranspose2d(4, 3, 2), "weight"), (4, 3, 3)),
    "transposed, bias frozen": Case(lambda: frozen(nn.ConvTranspose1d(24, 8, 3), "bias"), (24, 3), TRANSPOSED),
    "linear, weight frozen": Case(lambda: frozen(nn.Linear(5, 4), "weight"), (3, 5)),
    "linear, bias frozen": Case(lambda: frozen(nn.Linear(5, 4), "bias"), (3, 5), LINEAR),
    "group norm, weight frozen": Case(lambda: frozen(nn.GroupNorm(2, 4), "weight"), (4, 5)),
    "group norm, bias frozen": Case(lambda: frozen(nn.GroupNorm(2, 4), "bias"), (4, 5)),
    "instance norm, weight frozen": Case(lambda: frozen(nn.InstanceNorm1d(4, affine=True), "weight"), (4, 5)),
    "layer norm, weight frozen": Case(lambda: frozen(nn.LayerNorm(5), "weight"), (4, 5)),
    "layer norm, bias frozen": Case(lambda: frozen(nn.LayerNorm(5), "bias"), (4, 5)),
    "folded, weight frozen": Case(lambda: frozen(FoldedBatchNorm(4), "weight"), (4, 5)),
    "folded, bias frozen": Case(lambda: frozen(FoldedBatchNorm(4), "bias"), (4, 5)),
    "in-place activations": Case(Inplace, (4, 6, 6), DENSE),
}
BY_METHOD = [(name, method) for name, case in CASES.items() for method in case.methods]


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("name", "method"), BY_METHOD)
def test_every_operation_by_every_method(name, method, grouping):
    case, patients = CASES[name], torch.tensor(GROUPINGS[grouping])
    chooser = Forced(method)
    assert_exact(case.network(), case.batch(len(patients)), patients, chooser=chooser)
    assert chooser.times_used or not method


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "gram" in case.methods])
def test_gram_matrices_in_several_blocks(name, grouping, monkeypatch):
    """As they come where those of all patients together would not fit."""
    monkeypatch.setattr("monai_privacy.mechanisms.clipping.convolution._GRAM_BYTES", 1)
    case, patients = CASES[name], torch.tensor(GROUPINGS[grouping])
    assert_exact(case.network(), case.batch(len(patients)), patients, chooser=Forced("gram"))


@pytest.mark.parametrize(("name", "method"), [(name, method) for name, method in BY_METHOD if name.startswith("conv")])
@pytest.mark.parametrize("rows_in_a_run", [1, 2])
def test_convolutions_in_several_runs(rows_in_a_run, name, method, monkeypatch):
    """As they come where the rows of all patients together would not fit: a run ends with a patient, or in one."""
    monkeypatch.setattr(ConvolutionRule, "_row_bytes", lambda *_: 1)
    monkeypatch.setattr("monai_privacy.mechanisms.clipping.convolution._RUN_BYTES", rows_in_a_run)
    case, patients = CASES[name], torch.tensor(GROUPINGS["unequal, unsorted"])
    assert_exact(case.network(), case.batch(len(patients)), patients, chooser=Forced(method))


@pytest.mark.parametrize("run_bytes", [1, 1 << 22])
@pytest.mark.parametrize("method", ["loop", "grouped", "unfold"])
def test_norms_that_are_taken_as_large_gradients_come(method, run_bytes, monkeypatch):
    """Small ones are measured together at the end."""
    torch.manual_seed(0)
    monkeypatch.setattr("monai_privacy.mechanisms.clipping.convolution._RUN_BYTES", run_bytes)
    patients, network = torch.tensor(GROUPINGS["unequal, unsorted"]), nn.Conv1d(40, 40, 3)
    assert network.weight.numel() > 4096
    inputs = torch.randn((len(patients), 40, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chooser = Forced(method)
    assert_exact(network.double(), (inputs, torch.zeros(len(patients))), patients, chooser=chooser)
    assert chooser.times_used


@pytest.mark.parametrize("name", CASES)
def test_no_method_is_offered_that_is_not_tested(name):
    case, chooser = CASES[name], Forced("")
    patients = torch.tensor(GROUPINGS["unequal, unsorted"])
    clipper = GradientClipper(case.network(), row_losses, method="one_pass")
    clipper._chooser = chooser
    clipper(case.batch(len(patients)), patients, 1.0)
    assert chooser.offered <= set(case.methods)


@pytest.mark.parametrize("method", CONVOLUTION)
def test_rows_have_weights(method):
    case, patients = CASES["conv2d"], torch.tensor([7, 1, 7, 0, 1, 7])
    weights = torch.tensor([0.3, 2.0, 0.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    assert_exact(case.network(), case.batch(6), patients, chooser=Forced(method), row_weights=weights)


def test_padding_to_one_side_goes_the_slow_way():
    case = Case(lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 5))
    fault = "layers.weight is used by an operation without a rule"
    with pytest.warns(UserWarning, match="padding='same'"):
        assert_exact(case.network(), case.batch(6), torch.tensor([0, 1, 0, 2, 1, 0]), faults=fault)


class Layout(nn.Module):
    """A layer that gets its input, and the gradient of its output, in another order than that of the shape."""

    def __init__(self, layer: nn.Module, arrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.arrange = layer, arrange

    def forward(self, inputs):
        return self.arrange(self.layer(self.arrange(inputs)))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


ARRANGEMENTS = {
    "channels last": channels_last,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "cropped": lambda x: torch.cat([x, x], 2)[:, :, 1 : x.shape[2] + 1],
    "one of many": lambda x: torch.stack([x, x], 1)[:, 0],
}
ARRANGED = {
    "conv2d": (lambda: nn.Conv2d(4, 12, 2), (4, 3, 3), CONVOLUTION),
    "pointwise": (lambda: nn.Conv2d(8, 12, 1), (8, 2, 2), POINTWISE),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 3, 3), LOOPS),
    "conv3d": (lambda: nn.Conv3d(4, 12, 2), (4, 2, 3, 2), CONVOLUTION),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1), (4, 3, 2), LOOPS),
    "linear": (lambda: nn.Linear(5, 4), (2, 3, 5), LINEAR),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3), ("",)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 3), ("",)),
    "layer norm": (lambda: nn.LayerNorm(3), (4, 3, 3), ("",)),
    "folded batch norm": (lambda: FoldedBatchNorm(4), (4, 3, 3), ("",)),
    "prelu": (lambda: slopes(nn.PReLU(4)), (4, 3, 3), ("",)),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", ARRANGED)
def test_the_order_in_memory_changes_nothing(name, arrangement):
    make, shape, methods = ARRANGED[name]
    case = Case(lambda: Layout(make(), ARRANGEMENTS[arrangement]), shape)
    inputs, targets = case.batch(6)
    for method in methods:
        chooser = Forced(method)
        batch = (ARRANGEMENTS[arrangement](inputs), targets)
        assert_exact(case.network(), batch, torch.tensor([7, 1, 7, 0, 1, 7]), chooser=chooser)
        assert chooser.times_used or not method


class Summed(nn.Module):
    """The gradient of a sum is expanded: one number in memory for many elements."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return self.layer(inputs).flatten(2).sum(2)


# The sum over an instance norm does not depend on its input.
@pytest.mark.parametrize("name", sorted(set(ARRANGED) - {"instance norm"}))
def test_an_expanded_gradient_changes_nothing(name):
    make, shape, methods = ARRANGED[name]
    case = Case(lambda: Summed(make()), shape)
    for method in methods:
        chooser = Forced(method)
        assert_exact(case.network(), case.batch(6), torch.tensor([7, 1, 7, 0, 1, 7]), chooser=chooser)
        assert chooser.times_used or not method


@pytest.mark.parametrize("name", ["conv2d", "conv2d, depthwise", "conv_transpose2d, groups", "in-place activations"])
def test_a_network_in_channels_last(name):
    case = CASES[name]
    network = case.network().to(memory_format=torch.channels_last)
    inputs, targets = case.batch(6)
    for method in case.methods:
        batch = (channels_last(inputs), targets)
        assert_exact(network, batch, torch.tensor([7, 1, 7, 0, 1, 7]), chooser=Forced(method))


@pytest.mark.parametrize(
    "name", ["conv1d", "conv2d, reflect", "conv3d", "conv_transpose2d", "linear on 3 dimensions", "group norm",
             "instance norm 2d", "layer norm", "folded batch norm", "embedding", "prelu", "in-place activations"]
)  # fmt: skip
def test_meta_tensors_change_nothing(name):
    case = CASES[name]
    inputs, targets = case.batch(6)
    assert_exact(case.network(), (MetaTensor(inputs), targets), torch.tensor([7, 1, 7, 0, 1, 7]))


def test_an_input_that_is_changed_in_place_after_a_layer_with_a_frozen_weight():
    """Autograd keeps no input for such a layer; the engine must not need it either."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = frozen(nn.Linear(4, 4), "weight")

        def forward(self, inputs):
            features = inputs * 1.0
            out = torch.tanh(self.body(features))
            features += out
            return features

    case = Case(Residual, (4,))
    assert_exact(case.network(), case.batch(6), torch.tensor([7, 1, 7, 0, 1, 7]))


@st.composite
def convolutions(draw):
    """A convolution or transposed convolution of any geometry, and the shape of its input."""
    dims = draw(st.integers(1, 3))
    transposed, groups = draw(st.booleans()), draw(st.sampled_from([1, 1, 2, 4]))

    def sizes(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(least, most), min_size=dims, max_size=dims)))

    kernel, stride, dilation = sizes(1, 3), sizes(1, 3), sizes(1, 2)
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(min(p, s // 2) for p, s in zip(sizes(0, 2), span, strict=True))
    extra = sizes(0, 2)
    options = {
        "stride": stride,
        "dilation": dilation,
        "padding": padding,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    few, many = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 12))
    if transposed:
        space = tuple(e + 1 + (2 * p >= s) for e, p, s in zip(extra, padding, span, strict=True))
        beyond = sizes(0, 1)
        options["output_padding"] = tuple(
            min(o, max(s, d) - 1) for o, s, d in zip(beyond, stride, dilation, strict=True)
        )
        layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        return Case(lambda: layer(many, few, kernel, **options), (many, *space))
    space = tuple(max(1, s - 2 * p) + e for s, p, e in zip(span, padding, extra, strict=True))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    first, last = (many, few) if draw(st.booleans()) else (few, many)
    return Case(lambda: layer(first, last, kernel, **options), (first, *space))


patients_of_rows = st.lists(st.integers(0, 4), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(case=convolutions(), patients=patients_of_rows)
def test_convolutions_of_any_geometry(case, patients):
    network, batch, index = case.network(), case.batch(len(patients)), torch.tensor(patients)
    total, norms, bound = patient_by_patient(network, row_losses, batch, index)
    assume(bool(total[: case.shape[0]].all()))  # the padding may hide what came in
    clipper = GradientClipper(network, row_losses, method="one_pass")
    used = 0
    for method in ANY_METHOD:
        clipper._chooser = chooser = Forced(method)
        assert_close(clipper(batch, index, bound), total, norms)
        used += bool(chooser.times_used)
    assert used >= 2


@settings(max_examples=40, deadline=None)
@given(
    patients=patients_of_rows,
    most=st.sampled_from([1, 2, 3, 5, None]),
    name=st.sampled_from(["conv2d", "conv_transpose1d", "linear on 3 dimensions", "layer norm", "embedding", "prelu"]),
    bound=st.sampled_from([1e-4, 3.0, 1e6]),
)
def test_any_grouping_in_any_chunks(patients, most, name, bound):
    case, index = CASES[name], torch.tensor(patients)
    network, batch = case.network(), case.batch(len(patients))
    total, norms, _ = patient_by_patient(network, row_losses, batch, index, bound)
    for method in case.methods:
        clipper = GradientClipper(network, row_losses)
        clipper._chooser = Forced(method)
        assert_close(clipper(batch, index, bound, max_physical_batch_size=most), total, norms)


class Small(nn.Module):
    """A bit of everything, smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.body = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.point = nn.Conv2d(16, 8, 1)
        self.affine = FoldedBatchNorm(8)
        self.tokens = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, inputs):
        features = functional.silu(self.norm(self.stem(inputs)))
        features = self.affine(self.point(functional.silu(self.body(features))))
        tokens = self.tokens(features.flatten(2).transpose(1, 2))
        return self.head((tokens + functional.gelu(self.mix(tokens))).mean(1))


def small(rows: int = 6) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    case = Case(lambda: nn.Sequential(Small()), (2, 8, 8))
    torch.manual_seed(0)
    return Small().double(), case.batch(rows)


ANY_METHOD = tuple(dict.fromkeys((*DENSE, *POINTWISE)))
# Offered in float32 alone, and by builds of torch that have it.
ONEDNN = ("unfold, oneDNN", "unfold, oneDNN, norms", "product, oneDNN", "product, oneDNN, norms")
IN_FLOAT32 = (*ANY_METHOD, *(ONEDNN if has_onednn(torch.zeros(1)) else ()))
UNEQUAL = torch.tensor([7, 1, 7, 0, 1, 7])
CROSS_ENTROPY = nn.CrossEntropyLoss()


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("method", IN_FLOAT32)
def test_float32_agrees_with_float64(method, grouping):
    network, (inputs, targets) = small()
    patients = torch.tensor(GROUPINGS[grouping])
    total, norms, bound = patient_by_patient(network, CROSS_ENTROPY, (inputs, targets), patients)
    clipper = GradientClipper(network.float(), CROSS_ENTROPY, method="one_pass")
    clipper._chooser = chooser = Forced(method)
    found = clipper((inputs.float(), targets), patients, bound)
    assert chooser.times_used
    assert {g.dtype for g in found.gradients} == {torch.float32}
    assert found.norms.dtype == torch.float64
    assert_close(found, total, norms, 1e-5)


@pytest.mark.skipif(not has_onednn(torch.zeros(1)), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("counts", [(1,), (1, 1, 1), (2, 1, 3)])
@pytest.mark.parametrize("size", [(5, 7, 3), (3, 40, 48), (3, 40, 47), (8, 1, 1), (1, 1, 400)])
def test_products_by_onednn(size, counts):
    """The two sides of what is long; rows that do not lie in order; what was there before does not matter."""
    width, other, length = size
    units, generator = Units(counts), torch.Generator().manual_seed(0)
    gradients = torch.randn((units.rows, length, width), generator=generator).transpose(1, 2)
    inputs = torch.randn((units.rows, other, 2 * length), generator=generator)[:, :, ::2].transpose(1, 2)
    expected = units.sum(gradients.double() @ inputs.double())
    found = torch.full((units.number, width, other), float("nan"))
    onednn_products(gradients, inputs, units, found)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6 * length)
    inputs[-1] = float("nan")
    onednn_products(gradients, inputs, units, found)
    assert torch.isfinite(found).all(2).all(1).tolist() == [True] * (units.number - 1) + [False]


def test_onednn_is_offered_where_it_can_multiply(monkeypatch):
    x = torch.zeros(2, 4, 3, 3)
    gradient, weight, rule = (
        torch.zeros(2, 6, 3, 3),
        torch.zeros(6, 4, 1, 1),
        ConvolutionRule((1, 1), (0, 0), (1, 1), 1),
    )
    assert has_onednn(x) == ("product, oneDNN" in rule._forms(x, gradient, weight))
    assert not any("oneDNN" in form for form in rule._forms(x, gradient.double(), weight))
    assert not has_onednn(x.bfloat16())
    assert not has_onednn(x.to("meta"))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not has_onednn(x)


def test_norms_are_taken_in_full_precision_on_a_cpu():
    """On processors that multiply bfloat16, "medium" rounds to it: norms would be of other numbers than the sum."""
    settings = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    before_conv = settings[1].fp32_precision
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision(torch.zeros(1)):
            assert settings[0].fp32_precision == "ieee"
            assert settings[1].fp32_precision in ("none", "ieee")
        assert (settings[0].fp32_precision, settings[1].fp32_precision) == ("bf16", before_conv)
        with pytest.raises(KeyError), full_precision(torch.zeros(1)):
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
        assert settings[0].fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("method", LINEAR)
def test_float32_norms_of_many_elements(method):
    """Torch's float32 norm of two million elements is 4e-5 too low: the bound would be missed by as much."""
    torch.manual_seed(0)
    network = nn.Linear(1500, 1500, bias=False)
    inputs, targets, patients = torch.randn(3, 1500), torch.arange(3) % 2, torch.tensor([0, 1, 0])
    clipper = GradientClipper(network, row_losses, method="one_pass")
    clipper._chooser = Forced(method)
    found = clipper((inputs, targets), patients, 1.0)
    _, norms, _ = patient_by_patient(network.double(), row_losses, (inputs.double(), targets), patients)
    assert float(((found.norms - norms) / norms).abs().max()) < 2e-6


@pytest.mark.parametrize("method", ANY_METHOD)
def test_bfloat16_autocast(method):
    network, (inputs, targets) = small()
    total, norms, bound = patient_by_patient(network, CROSS_ENTROPY, (inputs, targets), UNEQUAL)
    network, inputs = network.float(), inputs.float()
    seen = []

    def forward(x: Tensor, rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            seen.append(network(x))
        return seen[-1].float()

    clipper = GradientClipper(network, CROSS_ENTROPY, method="one_pass")
    clipper._chooser = chooser = Forced(method)
    found = clipper((inputs, targets), UNEQUAL, bound, forward=forward)
    slow = GradientClipper(network, CROSS_ENTROPY, method="microbatch")
    reference = slow((inputs, targets), UNEQUAL, bound, forward=forward)
    assert chooser.times_used
    assert {outputs.dtype for outputs in seen} == {torch.bfloat16}
    assert {g.dtype for g in found.gradients} == {torch.float32}
    assert float(((found.norms - norms) / norms).abs().max()) < 1e-2
    assert float(((found.norms - reference.norms) / reference.norms).abs().max()) < 1e-2
    assert error(flat(found.gradients), total) < 2e-2
    # Sum and norms are of the same numbers, so that one patient's part keeps the bound.
    alone = clipper((inputs[:1], targets[:1]), UNEQUAL[:1], 1e-3, forward=forward)
    assert float(flat(alone.gradients).double().norm()) <= 1e-3 * (1 + 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ANY_METHOD)
def test_a_patient_that_is_not_finite_counts_as_zero_and_touches_no_other(method, bad):
    network, (inputs, targets) = small()
    others = UNEQUAL != 1
    total, norms, bound = patient_by_patient(network, CROSS_ENTROPY, (inputs[others], targets[others]), UNEQUAL[others])
    inputs[1, 0, 0, 0] = bad
    clipper = GradientClipper(network, CROSS_ENTROPY, method="one_pass")
    clipper._chooser = Forced(method)
    found = clipper((inputs, targets), UNEQUAL, bound)
    assert torch.isfinite(found.norms).tolist() == [True, False, True]
    assert_close(ClippedGradientSum(found.gradients, found.norms[[0, 2]]), total, norms)


@pytest.mark.parametrize("method", EMBEDDING)
def test_a_patient_that_is_not_finite_among_words(method):
    case = CASES["embedding"]
    network, (inputs, targets) = case.network(), case.batch(6)
    others = UNEQUAL != 1
    total, norms, bound = patient_by_patient(network, row_losses, (inputs[others], targets[others]), UNEQUAL[others])
    clipper = GradientClipper(network, row_losses, method="one_pass")
    clipper._chooser = Forced(method)
    targets = targets.double()
    targets[4] = float("nan")
    found = clipper((inputs, targets), UNEQUAL, bound)
    assert torch.isfinite(found.norms).tolist() == [True, False, True]
    assert_close(ClippedGradientSum(found.gradients, found.norms[[0, 2]]), total, norms)


HUGE = {
    "convolution": (lambda: nn.Conv1d(6, 8, 3, bias=False), (6, 6), (*CONVOLUTION, *ONEDNN[:2])),
    "pointwise": (lambda: nn.Conv2d(8, 12, 1, bias=False), (8, 2, 2), (*POINTWISE, *ONEDNN[2:])),
    "linear": (lambda: nn.Linear(5, 4, bias=False), (3, 5), LINEAR),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 5), ("",)),
    "folded batch norm": (lambda: FoldedBatchNorm(4), (4, 5), ("",)),
}


@pytest.mark.parametrize("where", ["inputs", "losses", "both"])
@pytest.mark.parametrize("exponent", [10.0, 19.0, 20.5, 21.5, 22.0, 30.0])
@pytest.mark.parametrize("name", HUGE)
def test_huge_gradients_are_bounded(name, exponent, where):
    """From 1e19 on squares overflow in float32; from 1e38 on clip factors are no normal numbers."""
    make, shape, methods = HUGE[name]
    torch.manual_seed(0)
    network, patients = make(), torch.tensor([0, 1, 1])
    inputs = torch.randn(3, *shape) * (1.0 if where == "losses" else 10.0**exponent)
    scale = 1.0 if where == "inputs" else 10.0**exponent

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.flatten(1).sum(1) * scale

    for method in methods:
        clipper = GradientClipper(network, loss, method="one_pass")
        clipper._chooser = chooser = Forced(method)
        found = clipper((inputs, torch.zeros(3)), patients, 0.5)
        assert chooser.times_used or not method or not has_onednn(torch.zeros(1))
        assert torch.isfinite(flat(found.gradients)).all()
        assert float(flat(found.gradients).double().norm()) <= 2 * 0.5 * (1 + 1e-4)
        alone = clipper((inputs[:1], torch.zeros(1)), patients[:1], 0.5)
        assert float(flat(alone.gradients).double().norm()) <= 0.5 * (1 + 1e-4)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool, times: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, 2)
        self.reentrant, self.times = reentrant, times

    def forward(self, inputs):
        features = self.stem(inputs)
        for _ in range(self.times):  # the same weights again
            features = checkpoint(self.block, features, use_reentrant=self.reentrant)
        return self.head(features.mean(dim=(2, 3)))


@pytest.mark.parametrize(("method", "times", "uses"), [("loop", 2, 3), ("grouped", 2, 3), ("loop, norms", 1, 2)])
def test_checkpoints_are_exact(method, times, uses):
    torch.manual_seed(0)
    network, batch = Checkpointed(reentrant=False, times=times).double(), Case(nn.Identity, (2, 5, 5)).batch(6)
    chooser = Forced(method)
    assert_exact(network, batch, UNEQUAL, loss=CROSS_ENTROPY, chooser=chooser)
    # What is run again in the backward pass is no further use.
    assert chooser.times_used == uses
    assert_exact(network, batch, UNEQUAL, loss=CROSS_ENTROPY, max_physical_batch_size=4)


@pytest.mark.parametrize("method", ["auto", "one_pass", "microbatch"])
def test_reentrant_checkpoints_are_refused(method):
    network, batch = Checkpointed(reentrant=True).double(), Case(nn.Identity, (2, 5, 5)).batch(6)
    clipper = GradientClipper(network, CROSS_ENTROPY, method=method)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        clipper(batch, UNEQUAL, 1.0)


class Counting(MethodChooser):
    """Notes which method was run for which use."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[int, str]] = []

    def collect(self, number, signature, methods, collect, *rest):
        def counted(name):
            self.runs.append((number, name))
            return collect(name)

        return super().collect(number, signature, methods, counted, *rest)


def test_deterministic_algorithms_are_honoured():
    network, (inputs, targets) = small()
    network, inputs = network.float(), inputs.float()
    choosers, sums = [Counting() for _ in range(3)], []
    torch.use_deterministic_algorithms(True)
    try:
        for chooser in choosers:
            clipper = GradientClipper(network, CROSS_ENTROPY, method="one_pass")
            clipper._chooser = chooser
            sums.append(flat(clipper((inputs, targets), UNEQUAL, 0.1).gradients))
    finally:
        torch.use_deterministic_algorithms(False)
    # One method a layer, without a trial: by time another one, with other roundings, might come next time.
    assert len({number for number, _ in choosers[0].runs}) == len(choosers[0].runs) == 5
    assert choosers[0].runs == choosers[1].runs == choosers[2].runs
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_methods_are_measured_once():
    network, batch = small()
    clipper = GradientClipper(network, CROSS_ENTROPY, method="one_pass")
    clipper._chooser = chooser = Counting()
    clipper(batch, UNEQUAL, 0.1)
    trials = len(chooser.runs)
    one = clipper(batch, UNEQUAL, 0.1)
    again = chooser.runs[trials:]
    two = clipper(batch, UNEQUAL, 0.1)
    assert trials > len(again) == 5
    assert chooser.runs[trials:] == 2 * again
    assert torch.equal(flat(one.gradients), flat(two.gradients))


def test_the_network_is_left_as_it_was():
    network, batch = small()
    before = copy.deepcopy(network.state_dict())
    flags = [(p.requires_grad, p.grad) for p in network.parameters()]
    GradientClipper(network, CROSS_ENTROPY, method="one_pass")(batch, UNEQUAL, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [(p.requires_grad, p.grad) for p in network.parameters()] == flags


@pytest.mark.parametrize(("held", "tried"), [(1 << 10, {"kept"}), (1 << 40, {"norms"})])
def test_norms_alone_are_found_only_where_gradients_cannot_be_kept(held, tried):
    methods = [NormMethod("kept", held, 0, 1.0), NormMethod("norms", 1, 0, 2.0, instead_of="kept")]
    asked = set()

    def collect(name):
        asked.add(name)
        return UnitGradients(torch.ones(2, 3))

    units, budget = Units((1, 1)), MemoryBudget(0)
    MethodChooser().collect(0, (), lambda: methods, collect, units, budget, torch.device("cpu"))
    assert asked == tried


@pytest.mark.parametrize("counts", [(1,), (3,), (1, 1, 1), (2, 5, 1, 1), (4, 4)])
@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_runs_hold_all_units_once(counts, most):
    runs = list(Units(counts).runs(most))
    assert tuple(count for _, run in runs for count in run.counts) == counts
    assert [row for rows, _ in runs for row in range(rows.start, rows.stop)] == list(range(sum(counts)))
    assert all(run.rows == rows.stop - rows.start for rows, run in runs)
    assert all(run.rows <= most or run.number == 1 for _, run in runs)


@st.composite
def geometries(draw):
    """A convolution in one to three dimensions, an image for it, and whose rows are whose."""
    dims = draw(st.integers(1, 3))
    sizes = {name: tuple(draw(st.integers(*least)) for _ in range(dims)) for name, least in _GEOMETRY.items()}
    groups, transposed = draw(st.integers(1, 2)), draw(st.booleans())
    image = tuple(
        max(n, d * (k - 1) + 1 - 2 * p)
        for n, d, k, p in zip(sizes["image"], sizes["dilation"], sizes["kernel"], sizes["padding"], strict=True)
    )
    rule = ConvolutionRule(sizes["stride"], sizes["padding"], sizes["dilation"], groups)
    return rule, sizes["kernel"], image, transposed, draw(st.sampled_from([(1, 1), (2, 2), (1, 3, 2)]))


_GEOMETRY = {"stride": (1, 3), "padding": (0, 2), "dilation": (1, 3), "kernel": (1, 3), "image": (1, 5)}


@settings(deadline=None, max_examples=150, derandomize=True)
@given(geometry=geometries())
@example(geometry=(ConvolutionRule((2,), (1,), (1,), 1), (1,), (1,), False, (1, 1)))  # only padding is seen
@example(geometry=(ConvolutionRule((2,), (1,), (1,), 1), (3,), (1,), False, (1, 1)))  # a phase without pixels
def test_gram_matrices_of_any_geometry_give_the_norms_of_the_gradients_themselves(geometry):
    rule, kernel, shape, transposed, counts = geometry
    units, generator = Units(counts), torch.Generator().manual_seed(0)
    image = torch.randn((units.rows, 2 * rule.groups, *shape), generator=generator, dtype=torch.float64)
    weight = torch.randn((3 * rule.groups, 2, *kernel), generator=generator, dtype=torch.float64)
    output = torch.randn(rule.run(image, weight, None)[0].shape, generator=generator, dtype=torch.float64)
    x, gradient = image, output
    if transposed:
        # The other way round: an image that no position of x reaches is left to the output's padding.
        reached = [
            s * (n - 1) - 2 * p + d * (k - 1) + 1
            for s, n, p, d, k in zip(rule.stride, output.shape[2:], rule.padding, rule.dilation, kernel, strict=True)
        ]
        left = tuple(n - r for n, r in zip(shape, reached, strict=True))
        rule, x, gradient = replace(rule, transposed=True, output_padding=left), output, image
    expected = rule._collect("loop", x, gradient, weight, units).squared_norms()
    found = rule._collect("gram", x, gradient, weight, units).squared_norms()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(geometry=geometries(), channels=st.sampled_from([(1, 4), (4, 1), (2, 3), (5, 2)]))
@example(
    geometry=(ConvolutionRule((1,), (0,), (1,), 1), (2,), (3,), False, (1, 1)), channels=(3, 2)
)  # one side is longer
@example(geometry=(ConvolutionRule((1,), (2,), (1,), 1), (2,), (3,), False, (1, 1)), channels=(4, 1))  # much padding
@example(geometry=(ConvolutionRule((1, 1), (1, 0), (1, 2), 1), (3, 2), (4, 5), False, (1, 3, 2)), channels=(4, 1))
def test_unfolding_of_any_geometry_gives_the_gradients_themselves(geometry, channels):
    rule, kernel, shape, _, counts = geometry
    rule, units, generator = replace(rule, groups=1), Units(counts), torch.Generator().manual_seed(0)
    x = torch.randn((units.rows, channels[0], *shape), generator=generator, dtype=torch.float64)
    weight = torch.randn((channels[1], channels[0], *kernel), generator=generator, dtype=torch.float64)
    gradient = torch.randn(rule.run(x, weight, None)[0].shape, generator=generator, dtype=torch.float64)
    factors = torch.rand(units.number, generator=generator, dtype=torch.float64)
    form = rule._forms(x, gradient, weight)[2]
    expected = rule._collect("loop", x, gradient, weight, units)
    found = rule._collect(form, x, gradient, weight, units)
    torch.testing.assert_close(found.arranged, expected.values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.squared_norms(), expected.squared_norms(), rtol=1e-12, atol=1e-12)
    sums = [material.weighted_sum(factors, None) for material in (found, expected)]
    torch.testing.assert_close(*sums, rtol=1e-12, atol=1e-12)


def test_the_side_with_fewer_numbers_is_unfolded():
    """A stride, or padding beyond the kernel, leaves the input only."""

    def turned(channels: tuple[int, int], kernel: int = 3, **options: int) -> bool:
        layer = nn.Conv2d(*channels, kernel, **options)
        x = torch.zeros(1, channels[0], 9, 9)
        sizes = layer.stride, layer.padding, layer.dilation
        return Unfolding.cheapest(x.shape, layer(x).shape, layer.weight.shape, *sizes).turned

    assert turned((8, 2))
    assert turned((8, 2), padding=2, dilation=2)
    assert not turned((2, 8))
    assert not turned((4, 4))  # the input's patches are fewer
    assert not turned((8, 2), stride=2)
    assert not turned((8, 2), padding=3)
    assert not turned((8, 2), kernel=1)


class _NewMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations make anew."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, UntypedStorage] = {}

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self._seen.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return made


@pytest.mark.parametrize(
    ("channels", "kernel", "options", "copied"),
    [
        ((8, 2), (3, 3), {"padding": (2, 1)}, True),  # turned
        ((8, 2), (3, 3), {"padding": (0, 0)}, True),  # turned, and the gradient is padded instead
        ((8, 2), (3, 3), {"padding": (4, 4)}, True),  # padding beyond the kernel: the input
        ((2, 8), (2, 3), {"padding": (3, 5), "stride": (2, 1)}, True),
        ((2, 8), (3, 3), {"padding": (0, 0)}, True),
        ((2, 8), (1, 1), {"padding": (0, 0), "stride": (2, 1)}, True),  # the pixels that are seen
        ((2, 8), (1, 1), {"padding": (0, 0)}, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_memory_that_an_unfolding_takes_is_what_it_says(channels, kernel, options, copied, dtype):
    """So that no method is admitted that does not fit."""
    layer = nn.Conv2d(*channels, kernel, **options, dtype=dtype)
    x = torch.zeros(3, channels[0], 9, 7, dtype=dtype)
    gradient = layer(x).detach()
    unfolding = Unfolding.cheapest(
        x.shape, gradient.shape, layer.weight.shape, layer.stride, layer.padding, layer.dilation
    )
    with _NewMemory() as new:
        unfolding.factors(x, gradient)
    said = 3 * unfolding.row_bytes(x, gradient)
    assert new.nbytes == said
    assert (said > 0) == copied
    if dtype == torch.float32:  # norms are taken in float32 whatever the network is in
        assert said == 3 * unfolding.row_bytes(x.bfloat16(), gradient.bfloat16())


@settings(deadline=None, max_examples=200)
@given(counts=st.lists(st.integers(1, 9), max_size=40), most=st.integers(1, 30))
def test_chunks_are_whole_patients(counts, most):
    patients = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    found = [chunk.units.counts for chunk in chunks((patients, patients), patients, None, most)]
    assert [count for group in found for count in group] == counts
    assert all(sum(group) <= most or len(group) == 1 for group in found)


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [
        (9, 8, [5, 4]),
        (13, 4, [4, 3, 3, 3]),
        (101, 10, [10] * 2 + [9] * 9),
        (10, 3, [3, 3, 2, 2]),
        (4, 4, [4]),
        (0, 4, []),
    ],
)
def test_a_small_rest_is_no_chunk_of_its_own(rows, most, expected):
    patients = torch.arange(rows)
    assert [len(chunk.rows) for chunk in chunks((patients, patients), patients, None, most)] == expected


@pytest.mark.parametrize("arrangement", ["every second", "expanded", "overlapping", "channels last", "a slice"])
@pytest.mark.parametrize("name", ["product", "unfold", "unfold of the gradient"])
def test_unfolding_reads_what_lies_anyhow(name, arrangement):
    """Also by oneDNN, which takes strides of zero for something else."""
    channels, kernel, padding = {"product": ((3, 64), 1, 0), "unfold": ((3, 8), 3, 1)}.get(name, ((3, 1), 3, 1))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((4, 2 * channels[0], 16, 12), generator=generator)
    x = {
        "every second": values[:, ::2],
        "expanded": values.to(memory_format=torch.channels_last)[:, :1].expand(-1, channels[0], -1, -1),
        "overlapping": values.as_strided((4, channels[0], 16, 12), (600, 1, 12, 1)),
        "channels last": values[:, : channels[0]].contiguous(memory_format=torch.channels_last),
        "a slice": values[:, : channels[0]],
    }[arrangement]
    weight = torch.randn((channels[1], channels[0], kernel, kernel), generator=generator)
    rule, units = ConvolutionRule((1, 1), (padding,) * 2, (1, 1), 1), Units((1, 2, 1))
    gradient = torch.randn(rule.run(x, weight, None)[0].shape, generator=generator)
    expected = rule._collect("loop", x.double(), gradient.double(), weight.double(), units)
    for form in rule._forms(x, gradient, weight)[2:]:
        found = rule._collect(form, x, gradient, weight, units)
        torch.testing.assert_close(found.arranged.double(), expected.values, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.squared_norms(), expected.squared_norms(), rtol=1e-5, atol=0)
        total = found.weighted_sum(torch.ones(3, dtype=torch.float64), None)
        assert total.is_contiguous()
        postponed = rule._collect(f"{form}, norms", x, gradient, weight, units)
        torch.testing.assert_close(postponed.squared_norms(), expected.squared_norms(), rtol=1e-5, atol=0)


def test_inherited_precision_stays_inherited():
    settings = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    before, before_each = torch.backends.fp32_precision, [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:  # set_float32_matmul_precision, called earlier, sets one of them
            setting.fp32_precision = "none"
        torch.backends.fp32_precision = "bf16"
        with full_precision(torch.zeros(1)):
            assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
        assert [setting.fp32_precision for setting in settings] == ["bf16", "bf16"]
        torch.backends.fp32_precision = "ieee"
        assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
    finally:
        torch.backends.fp32_precision = before
        for setting, value in zip(settings, before_each, strict=True):
            setting.fp32_precision = value


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [1 << 14, 3 << 14, (1 << 14) + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_of_large_gradients_is_the_same_in_parts_for_threads(threads, size, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((5, 2, size), generator=generator, dtype=dtype)[:, 1]  # units that do not lie side by side
    factors = torch.rand(5, generator=generator, dtype=torch.float64)
    finite = torch.tensor([True, True, True, False, True])
    infinite = torch.where(finite[:, None], values, torch.inf)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [
            (UnitGradients(values).weighted_sum(factors, None), factors),
            (UnitGradients(infinite).weighted_sum(factors, finite), factors * finite),
        ]
    finally:
        torch.set_num_threads(before)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    for total, weights in found:
        expected = (weights[:, None] * values.double()).sum(0)
        torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)
        assert total.dtype == dtype


def test_norm_and_sum_are_of_the_same_numbers_whatever_precision_is_set(monkeypatch):
    """What forms them runs where the setting is off, the sum of kept gradients too."""
    seen: list[str] = []

    def watched(self, *arguments, real=UnitGradients.weighted_sum):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return real(self, *arguments)

    monkeypatch.setattr(UnitGradients, "weighted_sum", watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        network, (inputs, targets) = small()
        clipper = GradientClipper(network.float(), CROSS_ENTROPY, method="one_pass", repeatable=True)
        clipper((inputs.float(), targets), UNEQUAL, 0.1)
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"ieee"}


def test_a_layer_without_parameters_may_be_made_anew_in_forward():
    class Anew(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, inputs):
            self.act = nn.Tanh()
            return self.act(self.layer(inputs))

    assert_exact(Anew().double(), Case(nn.Identity, (4,)).batch(6), UNEQUAL, faults="", loss=CROSS_ENTROPY)
