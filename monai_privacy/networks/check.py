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

"""What in a network breaks DP-SGD: layers that mix the rows of a batch, or that keep what they saw.

DP-SGD bounds what one patient changes in the *gradient*. Two kinds of layer go round that bound: those in which a
row's output depends on the other rows (clipping one patient's gradient then leaves their mark on the others'), and
those that write what they saw into a buffer (which leaves with the checkpoint, never noised). `check_network` finds
the known ones by type; `find_updated_buffers` finds the second kind by running the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from monai.networks.layers.vector_quantizer import EMAQuantizer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from monai_privacy.mechanisms.clipping.explanation import ClippingExplanation, explain_clipping

__all__ = ["LayerProblem", "ProblemKind", "check_network", "find_updated_buffers", "require_privately_trainable"]

ProblemKind = Literal[
    "batch_norm",
    "tracked_instance_norm",
    "data_dependent_buffer",
    "spectral_norm",
    "max_norm",
    "parallel_wrapper",
    "script_module",
    "quantized",
    "uninitialized",
    "parameter_dtype",
    "parameter_precision",
    "no_trainable_parameter",
]


@dataclass(frozen=True)
class LayerProblem:
    """One layer (or parameter) that keeps a network from being trained privately.

    Args:
        name: dotted path in the network, as in ``named_modules``; empty for the network itself.
        kind: what sort of problem it is, for programs.
        reason: why training with it would not be private, or would not run.
        remedy: what to do about it.
    """

    name: str
    kind: ProblemKind
    reason: str
    remedy: str

    def __str__(self) -> str:
        """Return the problem in one line."""
        return f"{self.name or 'the network itself'}: {self.reason}. {self.remedy}."


_Finding = tuple[ProblemKind, str, str]

_CONVERT = (
    "Call convert_batch_norm(network), or convert_batch_norm(network, method='fold', statistics_are_public=True) "
    "if the statistics were computed on public data"
)
_BATCH_NORM: _Finding = (
    "batch_norm",
    (
        "batch norm mixes the rows of a batch and writes un-noised statistics of the patients into running_mean and "
        "running_var; freezing it or calling eval() does not help, since trainers call network.train() each iteration"
    ),
    _CONVERT,
)
_BATCH_NORM_WITHOUT_STATISTICS: _Finding = (
    "batch_norm",
    "batch norm mixes the rows of a batch, so that no bound on one patient's gradient holds",
    "Call convert_batch_norm(network)",
)
_TRACKED_INSTANCE_NORM: _Finding = (
    "tracked_instance_norm",
    "instance norm with track_running_stats=True writes un-noised statistics of the patients into its buffers",
    _CONVERT,
)
_EMA_QUANTIZER: _Finding = (
    "data_dependent_buffer",
    "the moving averages of this vector quantizer absorb what it encodes un-noised",
    "Train it on public data beforehand, and keep it outside the network, in eval mode",
)
# The vector u is a function of the weights alone, which would make it post-processing. But each forward call moves
# it, the number of calls follows the (private) number of rows drawn, and calls of one step see different effective
# weights, so that a patient's gradient depends on how many rows came before it.
_SPECTRAL_NORM: _Finding = (
    "spectral_norm",
    (
        "spectral norm changes the effective weight with each forward call, so that the gradients of one step depend on "
        "how many rows were drawn and no bound on one patient's contribution holds"
    ),
    "Call torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.remove_spectral_norm",
)
_PARALLEL: _Finding = (
    "parallel_wrapper",
    "this wrapper splits batches or averages gradients before they are clipped",
    "Pass the network inside it (network.module)",
)
_SCRIPT: _Finding = (
    "script_module",
    "the layers of a TorchScript module can neither be checked nor be seen while gradients are clipped",
    "Pass the Python network, and script it after training",
)
_QUANTIZED: _Finding = (
    "quantized",
    "quantised layers cannot be trained, and quantisation observers record ranges of the patients' activations",
    "Train the float network, and quantise it after training on public data",
)
_UNINITIALIZED: _Finding = (
    "uninitialized",
    "a lazy layer takes its shape from the first batch of patients",
    "Run the network once on a synthetic batch, then check it again",
)
_MAX_NORM: _Finding = (
    "max_norm",
    "max_norm rescales the words that a batch has, in the weights themselves, un-clipped and un-noised",
    "Make the layer without max_norm",
)
_FLOAT32 = "keep parameters in float32 and set amp=True for bf16 arithmetic"
_PARAMETER_REMEDY = "Use a real floating-point parameter, or register_buffer if it is a constant"
_NO_TRAINABLE_PARAMETER = LayerProblem(
    name="",
    kind="no_trainable_parameter",
    reason="no parameter has requires_grad=True, so that there is nothing to train",
    remedy="Unfreeze the layers to be trained",
)


def check_network(
    network: nn.Module,
    example: Tensor | None = None,
    *,
    explain: Callable[[ClippingExplanation], object] = print,
) -> tuple[LayerProblem, ...]:
    """Find by type the layers that keep a network from being trained privately.

    With an ``example`` it also tries the clipping of gradients on synthetic rows like it, and prints layer by layer how
    that is done, and what it costs.

    The search does not depend on ``training`` or ``requires_grad`` of the layers: MONAI's trainer calls
    ``network.train()`` in each iteration, which undoes ``layer.eval()``, and a batch norm without trainable
    parameters still updates its statistics. Weight norm passes, being a function of parameters alone. Layers that a
    module keeps in a plain list, tuple, dictionary or attribute, where ``modules()`` does not look, are checked too.

    Args:
        network: the network about to be trained. It is not changed, and called only where an ``example`` is given.
        example: (R, ...) inputs; only their number, shape, dtype and device are used.
        explain: is given the :class:`ClippingExplanation`, where there is an example and no problem.

    Returns:
        The problems in the order of ``named_modules``, then those of parameters; empty if none is known. Layers of
        unknown type are not judged: run `find_updated_buffers` as well.
    """
    problems = [
        LayerProblem(name, *finding) for name, module in _walk(network) if (finding := _judge_layer(module)) is not None
    ]
    problems += [
        LayerProblem(name, "parameter_dtype", f"its dtype {p.dtype} is not real floating point", _PARAMETER_REMEDY)
        for name, p in network.named_parameters()
        if not p.dtype.is_floating_point
    ]
    problems += [
        LayerProblem(
            name, "parameter_precision", f"its dtype {p.dtype} rounds the clipped sum by more than it may", _FLOAT32
        )
        for name, p in network.named_parameters()
        # Measured: with 200 patients in bfloat16 one patient moved the sum by 1.3 times the clipping norm.
        if p.dtype in (torch.float16, torch.bfloat16)
    ]
    if not any(p.requires_grad for p in network.parameters()):
        problems.append(_NO_TRAINABLE_PARAMETER)
    if example is not None and not problems:
        explain(explain_clipping(network, example))
    return tuple(problems)


def require_privately_trainable(network: nn.Module) -> None:
    """Raise if `check_network` finds a problem.

    Args:
        network: the network about to be trained.

    Raises:
        ValueError: naming each layer, with the reason and the remedy once for each kind of problem.
    """
    names: dict[_Finding, list[str]] = {}
    for problem in check_network(network):
        finding = (problem.kind, problem.reason, problem.remedy)
        names.setdefault(finding, []).append(problem.name or "the network itself")
    if names:
        found = " ".join(f"{', '.join(layers)}: {reason}. {remedy}." for (_, reason, remedy), layers in names.items())
        raise ValueError(f"{type(network).__name__} cannot be trained privately. {found}")


def find_updated_buffers(network: nn.Module, forward: Callable[[], object]) -> tuple[str, ...]:
    """Find by running it what a network writes into itself while it looks at a batch in training mode.

    Args:
        network: the network about to be trained; copied once in memory for the time of the call.
        forward: calls the network, for example ``lambda: network(torch.zeros(2, 1, 64, 64))``. It runs once, after
            ``network.train()``, without gradients. Pass synthetic rows: what it returns is dropped.

    Returns:
        Dotted names of the buffers whose value ``forward`` changed, added or removed (``num_batches_tracked`` and
        buffers that are not saved count too), and of parameters, into which a forward call has no reason to write.
        Any name here is information about the batch, or about the number of calls, that leaves without noise.

    Raises:
        ValueError: where the network holds TorchScript modules or lazy parameters, whose state cannot be put back.

    Buffers, parameters, training flags and the random states of the CPU and of the network's GPUs are as before
    when it returns or raises. What a module keeps in plain attributes is not looked at.
    """
    _refuse_unrestorable(network)
    saved = [_ModuleState(name, module) for name, module in network.named_modules()]
    try:
        with torch.random.fork_rng(devices=_cuda_devices(network)), torch.no_grad():
            network.train()
            forward()
        return tuple(name for state in saved for name in state.updated())
    finally:
        for state in saved:
            state.restore()


def is_quantized(module: nn.Module) -> bool:
    """Say whether a layer is quantised, an observer, or prepared for quantisation-aware training."""
    # By name: importing torch.ao.nn.quantized only for an isinstance would load a dozen modules nobody uses.
    return type(module).__module__.startswith(("torch.ao.nn.", "torch.ao.quantization."))


def unregistered_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of what modules hold in plain attributes, lists, tuples or dictionaries only."""
    seen = {id(module) for module in network.modules()}
    for owner_name, owner in network.named_modules():
        if isinstance(owner, torch.jit.ScriptModule):
            continue
        for attribute, value in vars(owner).items():
            for suffix, root in _modules_in(value):
                for name, module in root.named_modules(prefix=_join(owner_name, attribute + suffix)):
                    if id(module) not in seen:
                        seen.add(id(module))
                        yield name, module


def _walk(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all layers, without those inside a TorchScript module, whose types say nothing."""
    inside: tuple[str, ...] = ()
    for name, module in network.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            inside += (f"{name}." if name else "",)
        yield name, module
    yield from unregistered_modules(network)


def _judge_layer(module: nn.Module) -> _Finding | None:
    """Return what is wrong with one layer, its children apart; the first match wins."""
    if isinstance(module, torch.jit.ScriptModule):
        return _SCRIPT
    if _is_parallel_wrapper(module):
        return _PARALLEL
    if is_quantized(module):
        return _QUANTIZED
    if any(is_lazy(tensor) for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return _UNINITIALIZED
    if isinstance(module, _BatchNorm):
        return _BATCH_NORM if module.track_running_stats else _BATCH_NORM_WITHOUT_STATISTICS
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return _TRACKED_INSTANCE_NORM
    if isinstance(module, EMAQuantizer):
        return _EMA_QUANTIZER
    if _has_spectral_norm(module):
        return _SPECTRAL_NORM
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return _MAX_NORM
    return None


def _is_parallel_wrapper(module: nn.Module) -> bool:
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return True
    # By name: builds of torch without torch.distributed have no FSDP class to import.
    return any(cls.__name__ in ("FullyShardedDataParallel", "FSDPModule") for cls in type(module).__mro__)


def _has_spectral_norm(module: nn.Module) -> bool:
    if isinstance(module, _SpectralNorm):
        return True
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


def _modules_in(value: object) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield "", value
    elif isinstance(value, list | tuple):
        yield from ((f"[{i}]", item) for i, item in enumerate(value) if isinstance(item, nn.Module))
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in value.items() if isinstance(item, nn.Module))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _refuse_unrestorable(network: nn.Module) -> None:
    for name, module in network.named_modules():
        finding = _judge_layer(module)
        if finding is not None and finding in (_SCRIPT, _UNINITIALIZED):
            raise ValueError(str(LayerProblem(name, *finding)))


def _cuda_devices(network: nn.Module) -> list[int]:
    tensors = (*network.parameters(), *network.buffers())
    return sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})


class _ModuleState:
    """Buffers, parameters and training flag of one module (its children apart), to compare with and to put back."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.training = module.training
        self.not_saved = set(module._non_persistent_buffers_set)
        self.tensors = [dict(store) for store in self._stores()]
        self.values = [
            {key: None if tensor is None else tensor.detach().clone() for key, tensor in store.items()}
            for store in self.tensors
        ]

    def updated(self) -> Iterator[str]:
        """Yield the names of tensors whose value is another, or that came or went."""
        for store, values in zip(self._stores(), self.values, strict=True):
            for key in dict.fromkeys((*values, *store)):
                if not _equal(store.get(key), values.get(key)):
                    yield _join(self.name, key)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back values and the very tensors: a module may assign a new tensor instead of writing into the old."""
        self.module.training = self.training
        self.module._non_persistent_buffers_set = self.not_saved
        for store, tensors, values in zip(self._stores(), self.tensors, self.values, strict=True):
            store.clear()
            store.update(tensors)
            for key, tensor in tensors.items():
                _write_back(tensor, values[key])

    def _stores(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.module._buffers, self.module._parameters


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    # NaN counts as equal to NaN: a buffer that starts as NaN and stays so was not updated.
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _write_back(tensor: Tensor | None, value: Tensor | None) -> None:
    # Untouched tensors stay so: writing would make autograd refuse a graph that saved them.
    if tensor is None or value is None or _equal(tensor, value):
        return
    if tensor.shape == value.shape and tensor.dtype == value.dtype:
        tensor.copy_(value)
    else:
        tensor.data = value
