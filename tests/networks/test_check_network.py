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

import pytest
import torch
from monai.networks.layers.vector_quantizer import EMAQuantizer
from torch import Tensor, nn

from monai_privacy.networks import (
    FoldedBatchNorm,
    LayerProblem,
    check_network,
    find_updated_buffers,
    require_privately_trainable,
)


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's, which needs a process group."""


class Holder(nn.Module):
    """Keeps layers where modules() does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)
        self.in_list = [nn.Sequential(nn.BatchNorm2d(4))]
        self.in_dict = {"norm": nn.BatchNorm2d(4)}
        self.also_registered = (self.conv,)


def frozen(layer: nn.Module) -> nn.Module:
    return layer.eval().requires_grad_(False)


def ddp() -> nn.Module:
    # Without a process group only the type can be had, and the type is what is judged.
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    return wrapper


PROBLEMS = {
    "batch_norm": nn.BatchNorm1d(4),
    "frozen_batch_norm": frozen(nn.BatchNorm2d(4)),
    "batch_norm_without_affine": nn.BatchNorm3d(4, affine=False),
    "batch_norm_without_statistics": nn.BatchNorm2d(4, track_running_stats=False),
    "sync_batch_norm": nn.SyncBatchNorm(4),
    "instance_norm": nn.InstanceNorm2d(4, track_running_stats=True),
    "ema_quantizer": EMAQuantizer(spatial_dims=2, num_embeddings=4, embedding_dim=4),
    "spectral_norm": nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "data_parallel": nn.DataParallel(nn.Linear(4, 4)),
    "ddp": ddp(),
    "fsdp": FullyShardedDataParallel(),
}
KINDS = {
    "frozen_batch_norm": "batch_norm",
    "batch_norm_without_affine": "batch_norm",
    "batch_norm_without_statistics": "batch_norm",
    "sync_batch_norm": "batch_norm",
    "instance_norm": "tracked_instance_norm",
    "ema_quantizer": "data_dependent_buffer",
    "data_parallel": "parallel_wrapper",
    "ddp": "parallel_wrapper",
    "fsdp": "parallel_wrapper",
}


def problems_of(layer: nn.Module) -> list[tuple[str, str]]:
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer))
    return [(problem.name, problem.kind) for problem in check_network(network)]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("training", [True, False])
def test_problems_are_found_in_any_mode(name: str, training: bool) -> None:
    found = problems_of(PROBLEMS[name].train(training))
    assert len(found) == 1
    path, kind = found[0]
    assert path.startswith("1.0")
    assert kind == KINDS.get(name, name)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), frozen(nn.BatchNorm2d(4))])
def test_reason_says_whether_statistics_leak(layer: nn.Module) -> None:
    assert "running_mean" in check_network(layer)[0].reason
    assert "method='fold'" in check_network(layer)[0].remedy
    without = nn.BatchNorm2d(4, track_running_stats=False).train(layer.training)
    assert "running_mean" not in check_network(without)[0].reason
    assert "method='fold'" not in check_network(without)[0].remedy


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_spectral_norm_is_found_and_weight_norm_is_not() -> None:
    assert problems_of(nn.utils.spectral_norm(nn.Linear(4, 4))) == [("1.0", "spectral_norm")]
    assert problems_of(nn.utils.weight_norm(nn.Linear(4, 4))) == []
    assert problems_of(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))) == []


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(4), lambda: nn.LazyBatchNorm2d()])
def test_lazy_layers_are_found(make: type[nn.Module]) -> None:
    layer = make()
    assert problems_of(layer) == [("1.0", "uninitialized")]
    with pytest.raises(ValueError, match="lazy"):
        find_updated_buffers(layer, lambda: None)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_script_modules_are_found_once() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    assert problems_of(scripted) == [("1.0", "script_module")]
    assert [problem.name for problem in check_network(scripted)] == [""]
    with pytest.raises(ValueError, match="TorchScript"):
        find_updated_buffers(scripted, lambda: None)


def test_quantised_layers_and_observers_are_found() -> None:
    from torch.ao.nn.qat import Linear
    from torch.ao.quantization import MinMaxObserver, QConfig, default_fake_quant, default_weight_fake_quant

    assert problems_of(MinMaxObserver()) == [("1.0", "quantized")]
    qat = Linear(4, 4, qconfig=QConfig(activation=default_fake_quant, weight=default_weight_fake_quant))
    assert problems_of(qat)[0] == ("1.0", "quantized")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_parameters_that_take_no_real_noise_are_found(dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ParameterList([nn.Parameter(torch.ones(2, dtype=dtype), False)]))
    assert [(p.name, p.kind) for p in check_network(network)] == [("1.0", "parameter_dtype")]


@pytest.mark.parametrize("network", [nn.Flatten(), frozen(nn.Linear(2, 2))])
def test_nothing_to_train_is_found(network: nn.Module) -> None:
    assert [(p.name, p.kind) for p in check_network(network)] == [("", "no_trainable_parameter")]


def test_hidden_layers_are_found() -> None:
    assert [p.name for p in check_network(Holder())] == ["in_list[0].0", "in_dict['norm']"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        FoldedBatchNorm(4),
        nn.LSTM(4, 4),
        nn.MultiheadAttention(4, 2),
        nn.Dropout(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_harmless_layers_pass(layer: nn.Module) -> None:
    assert problems_of(layer) == []
    require_privately_trainable(nn.Sequential(nn.Linear(4, 4), layer))


def test_error_names_each_layer_and_each_kind_once() -> None:
    network = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.DataParallel(nn.Flatten()))
    with pytest.raises(ValueError) as error:
        require_privately_trainable(network)
    text = str(error.value)
    assert text.startswith("Sequential cannot be trained privately. 0, 2: batch norm mixes the rows")
    assert text.count("convert_batch_norm(network)") == 1
    assert "3: this wrapper" in text
    assert "network.module" in text
    assert "\n" not in text


def test_problem_is_a_frozen_value_in_one_line() -> None:
    problem = LayerProblem("a.b", "batch_norm", "it mixes rows", "Convert it")
    assert str(problem) == "a.b: it mixes rows. Convert it."
    assert problem == LayerProblem("a.b", "batch_norm", "it mixes rows", "Convert it")
    with pytest.raises(AttributeError):
        problem.name = "c"  # type: ignore[misc]


# ---------------------------------------------------------------- find_updated_buffers


class Writer(nn.Module):
    """Writes into itself in every way a forward can."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.quiet = nn.Parameter(torch.ones(1))
        self.register_buffer("in_place", torch.zeros(2))
        self.register_buffer("assigned", torch.zeros(2), persistent=False)
        self.register_buffer("from_none", None)
        self.register_buffer("resized", torch.zeros(2))
        self.register_buffer("to_none", torch.zeros(2))
        self.register_buffer("undefined", torch.full((2,), float("nan")))
        self.register_buffer("same_value", torch.zeros(2))
        self.register_buffer("to_nan", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.in_place += x.sum()
            self.register_buffer("assigned", self.assigned + x.sum(), persistent=True)
            self.from_none = x.sum()
            self.resized.resize_(3).fill_(1.0)
            self.to_none = None
            self.same_value = torch.zeros(2)
            self.to_nan.fill_(float("nan"))
            self.scale.data.mul_(2)
            self.register_buffer("added", x.sum(), persistent=False)
        return x * self.scale * self.quiet


CHANGED = {"in_place", "assigned", "from_none", "resized", "to_none", "to_nan", "scale", "added"}


@pytest.mark.parametrize("fails", [False, True])
def test_all_writes_are_found_and_undone(fails: bool) -> None:
    network = nn.ModuleDict({"writer": Writer(), "norm": nn.BatchNorm1d(2)}).eval()
    network["norm"].train()
    tensors = {key: id(t) for m in network.values() for key, t in (*m._buffers.items(), *m._parameters.items())}
    values = {key: t.clone() for key, t in (*network.named_buffers(), *network.named_parameters())}
    keys = list(network.state_dict())
    flags = [m.training for m in network.modules()]
    random_state = torch.get_rng_state()

    def forward() -> None:
        assert all(m.training for m in network.modules())
        assert not torch.is_grad_enabled()
        network["norm"](network["writer"](torch.rand(3, 2) + 1))
        if fails:
            raise RuntimeError("out of memory")

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            find_updated_buffers(network, forward)
    else:
        found = find_updated_buffers(network, forward)
        assert len(found) == len(set(found))
        norm = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
        assert set(found) == {f"writer.{key}" for key in CHANGED} | norm

    assert [m.training for m in network.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(network.state_dict()) == keys
    now = {key: id(t) for m in network.values() for key, t in (*m._buffers.items(), *m._parameters.items())}
    assert now == tensors
    after = dict((*network.named_buffers(), *network.named_parameters()))
    assert after.keys() == values.keys()
    for key, value in values.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True, msg=key)
    assert network["writer"].scale.requires_grad


def test_an_open_graph_can_still_be_differentiated() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    loss = network(torch.ones(1, 2)).sum()
    assert find_updated_buffers(network, lambda: network(torch.ones(1, 2))) == ()
    loss.backward()


def test_spectral_norm_moves_with_each_call() -> None:
    torch.manual_seed(0)
    network = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64))
    found = find_updated_buffers(network, lambda: network(torch.zeros(1, 64)))
    assert any(name.endswith("_u") for name in found)
