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

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from monai_privacy.networks import FoldedBatchNorm, convert_batch_norm
from monai_privacy.networks.batch_norm import _group_count

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class CustomBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A subclass torch does not know, with torch's forward."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass


class BatchNormAct(nn.BatchNorm2d):
    """As in other libraries: an activation hides in the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ListHolder(nn.Module):
    """Keeps a layer where modules() does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.layers = [nn.BatchNorm2d(4)]


def trained(layer: nn.Module, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Give a layer statistics and weights as training would leave them."""
    generator = torch.Generator().manual_seed(0)
    layer.to(dtype)
    with torch.no_grad():
        layer.running_mean.normal_(generator=generator)
        layer.running_var.uniform_(0.1, 3, generator=generator)
        if layer.weight is not None:
            layer.weight.normal_(generator=generator)
        if layer.bias is not None:
            layer.bias.normal_(generator=generator)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(7)
    return layer


def fold(network: nn.Module, **options: bool) -> nn.Module:
    return convert_batch_norm(network, method="fold", statistics_are_public=True, **options)


# ---------------------------------------------------------------- group


@pytest.mark.parametrize(
    ("channels", "num_groups", "fewest", "groups"),
    [
        (64, 32, 2, 32),
        (48, 32, 2, 24),
        (33, 32, 2, 11),
        (37, 32, 2, 1),
        (16, 32, 2, 8),
        (64, 8, 2, 8),
        (64, 32, 16, 4),
        (2, 32, 2, 1),
        (1, 32, 2, 1),
        (6, 32, 1, 6),
        (6, 32, 10, 1),
    ],
)
def test_group_policy(channels: int, num_groups: int, fewest: int, groups: int) -> None:
    norm = convert_batch_norm(nn.BatchNorm2d(channels), num_groups=num_groups, min_channels_per_group=fewest)
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)


@given(channels=st.integers(1, 600), num_groups=st.integers(1, 64), fewest=st.integers(1, 40))
def test_group_count_is_the_largest_that_fits(channels: int, num_groups: int, fewest: int) -> None:
    fitting = [g for g in range(1, num_groups + 1) if channels % g == 0 and channels // g >= fewest]
    assert _group_count(channels, num_groups=num_groups, min_channels_per_group=fewest) == max(fitting, default=1)


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.SyncBatchNorm, CustomBatchNorm])
@pytest.mark.parametrize("channels", [3, 16, 32, 64])
def test_vectors_keep_their_values(make: type[nn.Module], channels: int) -> None:
    # One channel a group gives zeros (opacus#567), two give signs: one distinct magnitude.
    converted = convert_batch_norm(make(channels))
    out = converted(torch.randn(4, channels, generator=torch.Generator().manual_seed(0)))
    assert out.abs().round(decimals=2).unique().numel() > 3


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.SyncBatchNorm, CustomBatchNorm])
@pytest.mark.parametrize("channels", [1, 2])
def test_too_few_channels_for_vectors_are_refused(make: type[nn.Module], channels: int) -> None:
    with pytest.raises(ValueError, match=rf"^1 \({make.__name__}\).*{channels} channels.*method='fold'"):
        convert_batch_norm(nn.Sequential(nn.Linear(2, channels), make(channels)))


@pytest.mark.parametrize("dims", [2, 3])
def test_one_channel_with_space_is_normalised_over_space(dims: int) -> None:
    out = convert_batch_norm(NORMS[dims](1))(torch.randn(2, 1, *[5] * dims) * 3 + 1)
    per_row = out.flatten(1)
    torch.testing.assert_close(per_row.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(per_row.var(1, correction=0), torch.ones(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_group_carries_everything(dims: int, affine: bool) -> None:
    layer = trained(NORMS[dims](32, eps=0.25, affine=affine))
    layer.eval()
    if affine:
        layer.bias.requires_grad_(False)
    norm = convert_batch_norm(layer)
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.eps, norm.affine, norm.training) == (0.25, affine, False)
    if not affine:
        assert norm.weight is None
        assert norm.bias is None
        assert norm.state_dict() == {}
        return
    assert torch.equal(norm.weight, layer.weight)
    assert torch.equal(norm.bias, layer.bias)
    assert norm.weight is not layer.weight
    assert norm.weight.dtype == torch.float64
    assert norm.weight.device == layer.weight.device
    assert (norm.weight.requires_grad, norm.bias.requires_grad) == (True, False)
    assert convert_batch_norm(layer.train()).training


def test_group_without_bias() -> None:
    layer = nn.BatchNorm2d(8)
    layer.bias = None
    norm = convert_batch_norm(layer)
    assert norm.bias is None
    assert norm.weight is not None
    norm(torch.randn(1, 8, 3, 3)).sum().backward()


def test_group_keeps_tied_parameters() -> None:
    network = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    network[1].weight = network[0].weight
    converted = convert_batch_norm(network)
    assert converted[0].weight is converted[1].weight
    assert converted[0].bias is not converted[1].bias


def test_instance_norm_loses_its_statistics_only() -> None:
    layer = trained(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    converted = convert_batch_norm(nn.Sequential(layer, nn.InstanceNorm2d(4)))
    assert dict(converted.named_buffers()) == {}
    assert type(converted[0]) is nn.InstanceNorm2d
    assert layer.running_mean is not None
    assert layer.track_running_stats
    expected = copy.deepcopy(layer).train()(x)
    torch.testing.assert_close(converted[0].train()(x), expected)
    torch.testing.assert_close(converted[0].eval()(x), expected)


# ---------------------------------------------------------------- fold


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (nn.BatchNorm1d, (3, 6)),
        (nn.BatchNorm1d, (3, 6, 7)),
        (nn.BatchNorm2d, (3, 6, 4, 5)),
        (nn.BatchNorm3d, (3, 6, 4, 5, 2)),
        (nn.SyncBatchNorm, (3, 6, 4, 5)),
        (CustomBatchNorm, (3, 6, 4)),
        (nn.InstanceNorm3d, (3, 6, 4, 5, 2)),
    ],
)
def test_fold_equals_evaluation(
    make: type[nn.Module], shape: tuple[int, ...], affine: bool, dtype: torch.dtype, tolerance: float
) -> None:
    layer = trained(make(6, eps=1e-3, affine=affine, track_running_stats=True), dtype=dtype).eval()
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
    folded = fold(layer)
    assert isinstance(folded, FoldedBatchNorm)
    assert list(folded.buffers()) == []
    torch.testing.assert_close(folded(x), layer(x), rtol=tolerance, atol=tolerance)
    assert torch.equal(folded.train()(x), folded.eval()(x))


@pytest.mark.parametrize(
    ("affine", "source_trained", "freeze", "expected"),
    [
        (True, True, False, True),
        (True, True, True, False),
        (True, False, False, False),
        (False, True, False, False),
    ],
)
def test_fold_trains_what_was_trained(affine: bool, source_trained: bool, freeze: bool, expected: bool) -> None:
    layer = trained(nn.BatchNorm2d(4, affine=affine)).requires_grad_(source_trained)
    folded = fold(layer, freeze_folded=freeze)
    assert [p.requires_grad for p in folded.parameters()] == [expected] * 2


@pytest.mark.parametrize("declared", [False, 1, "yes"])
def test_fold_needs_the_declaration(declared: object) -> None:
    with pytest.raises(ValueError, match=r"never noised.*statistics_are_public=True"):
        convert_batch_norm(trained(nn.BatchNorm2d(4)), method="fold", statistics_are_public=declared)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.BatchNorm2d(4), "never seen data"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "never seen data"),
        (nn.BatchNorm2d(4, track_running_stats=False), "no statistics to fold"),
    ],
)
def test_fold_refuses_layers_without_statistics(layer: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^0\.1 .*{reason}"):
        fold(nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), layer)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_fold_refuses_statistics_that_are_none(value: float) -> None:
    layer = trained(nn.BatchNorm2d(4))
    layer.running_var[2] = value
    if value == float("inf"):
        layer.running_mean[2] = value
    with pytest.raises(ValueError, match="not finite"):
        fold(layer)


def test_fold_accepts_statistics_without_a_count() -> None:
    # Weights saved before torch 0.4.1, torchvision's among them, have no num_batches_tracked.
    layer = trained(nn.BatchNorm2d(4))
    layer.num_batches_tracked.zero_()
    assert isinstance(fold(layer), FoldedBatchNorm)


# ---------------------------------------------------------------- any method


@pytest.mark.parametrize("method", ["group", "fold"])
def test_root_shared_and_nested(method: str) -> None:
    shared = trained(nn.BatchNorm2d(4))
    network = nn.ModuleDict(
        {"a": shared, "b": nn.Sequential(nn.Conv2d(4, 4, 1), shared), "c": trained(nn.BatchNorm2d(4))}
    )
    converted = convert_batch_norm(network, method=method, statistics_are_public=True)
    assert converted["a"] is converted["b"][1]
    assert converted["a"] is not converted["c"]
    assert list(converted) == ["a", "b", "c"]
    assert network["a"] is network["b"][1] is shared
    wanted = nn.GroupNorm if method == "group" else FoldedBatchNorm
    assert type(convert_batch_norm(shared, method=method, statistics_are_public=True)) is wanted


def test_one_layer_twice_in_one_parent() -> None:
    shared = nn.BatchNorm2d(4)
    converted = convert_batch_norm(nn.Sequential(shared, nn.Conv2d(4, 4, 1), shared))
    assert isinstance(converted[0], nn.GroupNorm)
    assert converted[0] is converted[2]


@pytest.mark.parametrize("method", ["group", "fold"])
def test_without_batch_norm_it_is_an_equal_copy(method: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.Dropout()).eval()
    network[1].train()
    converted = convert_batch_norm(network, method=method, statistics_are_public=True)
    assert converted is not network
    assert repr(converted) == repr(network)
    assert [m.training for m in converted.modules()] == [m.training for m in network.modules()]
    for (key, one), (other_key, other) in zip(
        network.state_dict().items(), converted.state_dict().items(), strict=True
    ):
        assert key == other_key
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


def test_optimizer_of_the_copy_does_not_touch_the_original() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    before = copy.deepcopy(network.state_dict())
    converted = convert_batch_norm(network)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "layer"}, "method is 'layer'"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"min_channels_per_group": 0}, "min_channels_per_group is 0"),
    ],
)
def test_options_are_checked(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        convert_batch_norm(nn.BatchNorm2d(4), **options)  # type: ignore[arg-type]


def hooked() -> nn.Module:
    layer = trained(nn.BatchNorm2d(4))
    layer.register_forward_hook(lambda *_: None)
    return layer


def parametrized() -> nn.Module:
    return nn.utils.parametrize.register_parametrization(trained(nn.BatchNorm2d(4)), "weight", nn.Identity())


class OptimizedModule(nn.Module):
    """Stands for torch._dynamo's, which takes seconds to import."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = nn.BatchNorm2d(4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("method", ["group", "fold"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.jit.script(nn.BatchNorm2d(4)), "TorchScript"),
        (lambda: nn.LazyBatchNorm2d(), "lazy"),
        (hooked, "hooks"),
        (parametrized, "parametrization"),
        (lambda: trained(BatchNormAct(4)), "forward of its own"),
        (ListHolder, "plain attribute"),
        (OptimizedModule, "compiled"),
        (lambda: torch.ao.nn.quantized.BatchNorm2d(4), "quantised"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_what_conversion_would_break_is_refused(make: type[nn.Module], reason: str, method: str) -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 1), make())
    with pytest.raises(ValueError, match=rf"^1.*cannot be converted: .*{reason}"):
        convert_batch_norm(network, method=method, statistics_are_public=True)  # type: ignore[arg-type]
