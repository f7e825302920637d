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

"""One forward and one backward pass in which parameters receive no gradient, and their layers are heard instead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from monai_privacy.mechanisms.clipping.calls import Call, read_call
from monai_privacy.mechanisms.clipping.operation import OperationRule

Key = tuple[str | tuple[str, str], tuple[int, ...], int]
# How a network comes to do one thing or another by what is in a tensor, and so by who else is in the batch.
_LOOKS = {
    Tensor.__bool__: "bool",
    Tensor.__float__: "float",
    Tensor.__int__: "int",
    Tensor.__index__: "index",
    Tensor.item: "item",
    Tensor.tolist: "tolist",
    Tensor.numpy: "numpy",
    Tensor.__array__: "numpy",
}
_DROPOUTS = (
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
)


class Use(NamedTuple):
    """A use of trained parameters in a forward pass.

    Args:
        number: counts the uses of the pass from zero.
        operation: what was done.
        weight: position of the weight among the trained parameters; None where it is not one.
        bias: likewise.
        rows: first dimension of the input.
    """

    number: int
    operation: OperationRule
    weight: int | None
    bias: int | None
    rows: int

    @property
    def parameters(self) -> tuple[int, ...]:
        """Positions of the trained parameters."""
        return tuple(at for at in (self.weight, self.bias) if at is not None)


class Listener(ABC):
    """What hears the uses of parameters in one pass; the base class computes and remembers nothing of gradients."""

    # Whether dropout leaves everything as it is.
    without_dropout = False

    def weights(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """The values to compute with."""
        return call.weight, call.bias

    @abstractmethod
    def heard(
        self,
        use: Use,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        extra: tuple[Tensor, ...],
        gradient: Tensor,
        wants_input: bool,
    ) -> Tensor | None:
        """The gradient of the input, where wanted; called once for each use in the backward pass."""


@dataclass
class Pass:
    """One forward pass, as it was heard.

    Args:
        uses: all uses of trained parameters, in order.
        times_used: how often each trained parameter was used, by position.
        input_bytes: memory of the inputs that the uses saved.
        looked_at: what numbers were taken out of tensors, and how.
    """

    uses: list[Use] = field(default_factory=list)
    times_used: dict[int, int] = field(default_factory=dict)
    input_bytes: int = 0
    looked_at: list[tuple[str, str]] = field(default_factory=list)

    def key(self, rows: int) -> tuple[Key, ...] | None:
        """What was called on what, for a batch of ``rows``, and what numbers were looked at; None where a use has rows
        that are no multiple of it."""
        if any(use.rows % rows for use in self.uses):
            return None
        uses = tuple((use.operation.name, use.parameters, use.rows // rows) for use in self.uses)
        return uses + tuple(((how, value), (), 0) for how, value in self.looked_at)


class Interception(TorchFunctionMode):
    """While it is active, operations on trained parameters are heard by a listener instead of differentiated for them.

    The listener decides what to make of inputs and output gradients. Whatever reaches a parameter's gradient all the
    same is a use that was not seen here: the caller has to look (see ``GradientClipper``).

    Args:
        parameters: the trained parameters.
        listener: hears each use.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], listener: Listener) -> None:
        super().__init__()
        self._positions = {id(parameter): at for at, parameter in enumerate(parameters)}
        self._listener = listener
        self._replaying = False
        self.heard = Pass()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See ``TorchFunctionMode``."""
        if func in _LOOKS:
            value = func(*args, **(kwargs or {}))
            if not self._replaying:
                self.heard.looked_at.append((_LOOKS[func], repr(value)))
            return value
        if self._listener.without_dropout and func in _DROPOUTS:
            return args[0] if args else (kwargs or {})["input"]
        call = read_call(func, args, kwargs or {})
        if call is None or not self._is_ours(call):
            return func(*args, **(kwargs or {}))
        return self._run(call)

    def gradients(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[int]:
        """Run the backward pass; return the positions of parameters that were used where it was not heard."""
        # Checkpointed parts are run again inside of the backward pass: those calls are no further uses.
        self._replaying = True
        try:
            # Not torch.autograd.grad: as a torch function it takes the mode off, and those calls would not be heard.
            with self:
                found = _engine_run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, tuple(parameters), True, False
                )
        finally:
            self._replaying = False
        return [at for at, gradient in enumerate(found) if gradient is not None]

    def _is_ours(self, call: Call) -> bool:
        """Whether every differentiable parameter of the call is a trained parameter, and there is one."""
        tensors = [tensor for tensor in (call.weight, call.bias) if tensor is not None]
        # A computed weight (weight norm, parametrizations) has parameters of its own, which would lose their gradient.
        if any(t.requires_grad and not t.is_leaf for t in tensors) or id(call.x) in self._positions:
            return False
        return torch.is_grad_enabled() and any(id(tensor) in self._positions for tensor in tensors)

    def _run(self, call: Call) -> Tensor:
        x = call.x if type(call.x) is Tensor else call.x.as_subclass(Tensor)
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
            if call.operation.lower_precision:
                x = x.to(torch.get_autocast_dtype(device))
            elif device == "cuda":
                x = x.float()
        use = Use(
            len(self.heard.uses),
            call.operation,
            self._position(call.weight),
            self._position(call.bias),
            len(x),
        )
        if not self._replaying:
            self.heard.uses.append(use)
            self.heard.input_bytes += x.nbytes
            for at in use.parameters:
                self.heard.times_used[at] = self.heard.times_used.get(at, 0) + 1
        return _Heard.apply(use, self._listener, x, *self._listener.weights(call))  # type: ignore[no-any-return,no-untyped-call]

    def _position(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self._positions.get(id(tensor))


class _Heard(torch.autograd.Function):
    """Computes an operation as torch does; gives a gradient to its input and none to its parameters."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, use: Use, listener: Listener, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        with _as_they_are(x):
            y, extra = use.operation.run(x, *_lowered(use, x, weight, bias))
        ctx.use, ctx.listener = use, listener
        if use.weight is None and not use.operation.reads_input:
            # As torch does: what may be changed in place afterwards is not kept where nobody asks for it.
            x = x.new_empty(1).expand(x.shape)
        ctx.save_for_backward(x, weight, bias, *extra)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # asked here: the wrapper of torch's own takes longer than many a layer
            raise RuntimeError("a gradient of a gradient was asked for, which is not heard. Take create_graph away.")
        if gradient is None:
            return (None,) * 5
        x, weight, bias, *extra = ctx.saved_tensors  # may run a checkpointed part again, which is heard
        use = ctx.use
        with torch._C.DisableTorchFunction(), _as_they_are(x):
            weight, bias = _lowered(use, x, weight, bias)
            found = ctx.listener.heard(use, x, weight, bias, tuple(extra), gradient, ctx.needs_input_grad[2])
        return None, None, found, None, None


def _lowered(use: Use, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The parameters in the dtype that autocast chose for ``x``."""
    if not use.operation.lower_precision:
        return weight, bias
    dtype = x.dtype
    # Asking is quicker than a conversion that does nothing.
    weight = weight if weight is None or weight.dtype == dtype else weight.to(dtype)
    return weight, bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def _as_they_are(x: Tensor) -> AbstractContextManager[Any]:
    """No casts by autocast: the dtypes were chosen already."""
    # Making the context costs more than many a small layer.
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
