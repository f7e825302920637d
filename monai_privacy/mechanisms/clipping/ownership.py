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

"""Which rows of a layer are whose? Asked on synthetic rows, by what each row's loss sends back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monai_privacy.mechanisms.clipping.calls import Call
from monai_privacy.mechanisms.clipping.interception import Interception, Key, Listener, Use
from monai_privacy.mechanisms.clipping.materials import Material
from monai_privacy.mechanisms.clipping.operation import NormMethod, Wanted
from monai_privacy.mechanisms.clipping.units import Units
from monai_privacy.mechanisms.probe import synthetic_rows, synthetic_targets
from monai_privacy.mechanisms.randomness import cuda_devices_of, fresh_randomness

_FEWEST_ROWS = 2
_MOST_ROWS = 32
_EACH_BY_ITSELF = 8
# Numbers that are summed up in float64 at once.
_SUMMARY = 1 << 16
_TOLERANCE = 1e-5
_PLACE_TOLERANCE = 1e-2
WITHOUT_RULE = "is used by an operation without a rule"


class OwnershipProbe(Listener):
    """Notes of each use what its input rows are, and the gradients that its output rows receive.

    The weights are replaced by random ones: a layer that starts at zero (a new head, LoRA) would stop the gradient.

    Args:
        weights: random weights by identity of the parameter, to be filled and shared between probes.
        trained: identities of the trained parameters; what else is used as a weight may come from the batch.
    """

    def __init__(self, weights: dict[int, Tensor], trained: frozenset[int]) -> None:
        self._weights = weights
        self._trained = trained
        self.touched: dict[int, Tensor] = {}
        self.seen: dict[int, Tensor] = {}

    def weights(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """See the base class."""
        weight = call.weight
        if weight is None or id(weight) not in self._trained:
            return weight, call.bias
        value = self._weights.get(id(weight))
        if value is None:
            generator = torch.Generator().manual_seed(len(self._weights))
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
            fan_in = max(1, weight[0].numel()) if weight.dim() > 1 else 1
            value = noise / fan_in**0.5 if weight.dim() > 1 else 1 + 0.1 * noise
            # A checkpointed part that is run again must find the same weights, and so must the next probe.
            self._weights[id(weight)] = value
        return _InPlaceOf.apply(weight, value), call.bias  # type: ignore[no-untyped-call]

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
        """See the base class."""
        self.touched[use.number] = (gradient != 0).reshape(len(gradient), -1).any(1).cpu()
        looked_at = [gradient] if use.weight is None and not use.operation.reads_input else [gradient, x]
        self.seen[use.number] = torch.stack([_summary(values) for values in looked_at], 1).cpu()
        wanted = Wanted(input=wants_input, weight=False, bias=False)
        return use.operation.backward(x, weight, bias, extra, gradient, Units((1,) * len(x)), wanted, _never).input


class _InPlaceOf(torch.autograd.Function):
    """A value that stands for a parameter: still a function of it, so that the backward pass comes through here."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        ctx.set_materialize_grads(False)  # of the weight's size, for nobody
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None]:  # type: ignore[override]
        return None, None


def _summary(values: Tensor) -> Tensor:
    """(R, ...) to (R, 2): two sums that hardly ever agree where the rows do not."""
    flat = values.detach().reshape(len(values), -1)
    ramp = torch.linspace(0.5, 1.5, flat.shape[1], dtype=torch.float64, device=flat.device)
    # Some at a time: a copy of all of them in float64 would be the largest tensor of all.
    parts = map(Tensor.double, flat.split(max(1, _SUMMARY // max(1, flat.shape[1]))))
    return torch.cat([torch.stack([part.abs() @ ramp, part @ ramp], 1) for part in parts])


def probed_rows(rows: int) -> int:
    """How many synthetic rows are looked at for a batch of so many: as many, since a network may mix one row with the
    third after it, and no more, since memory may not hold them; but at most 32."""
    return max(_FEWEST_ROWS, min(_MOST_ROWS, rows))


def batches_alike(rows: int) -> int:
    """The same number for batches for which one probe will do: each size by itself, larger ones by power of two."""
    rows = probed_rows(rows)
    return rows if rows < _EACH_BY_ITSELF else _EACH_BY_ITSELF + rows.bit_length()


def find_fault(
    parameters: Sequence[nn.Parameter],
    names: Sequence[str],
    row_losses: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
) -> tuple[tuple[Key, ...] | None, str]:
    """Ask whether each row of each use belongs to one row of the batch, in the order of the batch.

    A layer may see m rows for each row of the batch (slices, windows, instances of a bag): rows m i to m (i + 1) are
    then those of row i. Two things are asked for:

    - The loss of row i sends a gradient to its own rows alone: exact zeros elsewhere, not small numbers.
    - What the other rows of each use are, and what gradients they receive, does not change with row i; asked of three rows.

    No probe can find a network that mixes rows only where it sees what the probe did not show.

    Args:
        parameters: the trained parameters.
        names: their names.
        row_losses: (R, ...) inputs and (R, ...) targets to (R,) losses.
        inputs: any batch of at least one row; only its shape, dtype and device are used (see ``probed_rows``).
        targets: likewise.

    Returns:
        What was called on what (see ``Pass.key``), and why gradients cannot be told apart by rows; empty if they can.
    """
    rows = probed_rows(len(inputs))
    first_targets = synthetic_targets(targets, rows)
    weights: dict[int, Tensor] = {}
    key: tuple[Key, ...] | None = None
    reached: Tensor | None = None
    # A forward pass for each question: a graph that is kept for several takes nearly twice the memory of training.
    for row in (0, rows // 2, rows - 1):
        probe, mode, losses = _run(weights, parameters, row_losses, synthetic_rows(inputs, rows), first_targets)
        key = mode.heard.key(rows)
        if key is None:
            return None, "a layer sees a number of rows that is no multiple of the batch's"
        unheard = mode.gradients(losses[row], parameters)
        reached = torch.zeros(len(mode.heard.uses), dtype=torch.bool) if reached is None else reached
        for number, touched in probe.touched.items():
            own = touched.unflatten(0, (rows, -1))
            if own.sum() > own[row].sum():
                return key, _mixes(mode.heard.uses[number], names)
            reached[number] |= bool(own[row].any())
        if unheard:
            return key, f"{names[unheard[0]]} {WITHOUT_RULE}"
        del losses
    assert reached is not None
    if not bool(reached.all()):
        use = mode.heard.uses[int((~reached).nonzero()[0])]
        return key, f"{use.operation.name} of {names[use.parameters[0]]} received no gradient from synthetic rows"
    probe, mode, losses = _run(weights, parameters, row_losses, synthetic_rows(inputs, rows), first_targets)
    mode.gradients(losses.sum(), parameters)
    del losses
    tried = 0
    for row, changed_inputs, changed_targets in _with_another_row(inputs, first_targets, rows):
        try:
            other, other_mode, other_losses = _run(weights, parameters, row_losses, changed_inputs, changed_targets)
        except (IndexError, RuntimeError):  # a label or a word that is not taken here: no evidence either way
            continue
        tried += changed_targets is first_targets
        if other_mode.heard.key(rows) != key:
            return key, "what the network calls depends on what it sees"
        other_mode.gradients(other_losses.sum(), parameters)
        del other_losses
        for number, seen in probe.seen.items():
            if not _same_but(row, seen.unflatten(0, (rows, -1)), other.seen[number].unflatten(0, (rows, -1))):
                return key, _mixes(mode.heard.uses[number], names)
    # Where others of another size will not be asked for, one more row than they: what works by so many rows at a time is
    # not seen in fewer. Elsewhere one fewer, which takes no more memory than training does.
    more = rows == _FEWEST_ROWS or batches_alike(rows) >= _EACH_BY_ITSELF
    if tried and (moved := _moved(weights, parameters, row_losses, synthetic_rows(inputs, rows), first_targets, more)):
        return key, moved
    return key, "" if tried else "the network takes no synthetic rows but one kind, so that nothing can be asked"


def _moved(
    weights: dict[int, Tensor],
    parameters: Sequence[nn.Parameter],
    row_losses: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    more: bool,
) -> str:
    """Whether a row depends on its place in the batch, or on the number of rows; empty if it does not.

    Asked of one row more, or one fewer, and without dropout. A network that draws otherwise at random is not asked: its
    draws belong to places.
    """
    rows = len(inputs)

    def seen(order: Tensor, seed: int = 0) -> tuple[Key | tuple[Key, ...] | None, list[Tensor]]:
        probe, mode, losses = _run(weights, parameters, row_losses, inputs[order], targets[order], seed, still=True)
        mode.gradients(losses.sum(), parameters)
        found = [values.unflatten(0, (len(order), -1)) for _, values in sorted(probe.seen.items())]
        return mode.heard.key(len(order)), [*found, losses.detach().cpu().double()[:, None, None, None]]

    places = torch.arange(rows)
    key, base = seen(places)
    if not _alike(base, seen(places, seed=1)[1]):
        return ""
    for order in (places.roll(1), torch.cat([places, places[:1]]) if more else places[:-1]):
        other_key, other = seen(order)
        if other_key != key or not _alike([values[order] for values in base], other):
            return "what a row gives depends on its place in the batch, or on the number of rows"
    return ""


def _alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    # Kernels round otherwise at another place, and a ReLU that flips makes it more.
    return len(one) == len(other) and all(
        bool(((a - b).abs() <= _PLACE_TOLERANCE * a.abs().amax((0, 1), keepdim=True)).all())
        for a, b in zip(one, other, strict=True)
    )


def _run(
    weights: dict[int, Tensor],
    parameters: Sequence[nn.Parameter],
    row_losses: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    seed: int = 0,
    still: bool = False,
) -> tuple[OwnershipProbe, Interception, Tensor]:
    probe = OwnershipProbe(weights, frozenset(id(parameter) for parameter in parameters))
    probe.without_dropout = still
    mode = Interception(parameters, probe)
    # Dropout falls alike in each run; outside the fork the user's random state does not move.
    with fresh_randomness(seed, cuda_devices=cuda_devices_of(inputs)), mode:
        losses = row_losses(inputs, targets)
    return probe, mode, losses


def _with_another_row(inputs: Tensor, targets: Tensor, rows: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Batches of which one row is another: the first, one in the middle or the last, or the first's label."""
    for row, factor, shift in ((0, 3.0, 1.0), (rows // 2, -2.0, -1.0), (rows - 1, 3.0, 1.0)):
        changed = synthetic_rows(inputs, rows)
        changed[row] = changed[row] * factor + shift if changed.is_floating_point() else 1 - changed[row]
        yield row, changed, targets
    # Far outside what is usual, and nothing at all.
    for row, value in ((0, 1e6 if inputs.is_floating_point() else 100), (rows - 1, 0)):
        changed = synthetic_rows(inputs, rows)
        changed[row] = changed[row] * value
        yield row, changed, targets
    # Another class, and the usual marks of a missing label, where the type has them.
    others: list[Tensor | float] = [1, -1, -100, 255]
    if targets.dtype == torch.bool:
        others = [~targets[0]]
    elif targets.is_floating_point():
        others.append(math.nan)
    else:
        limits = torch.iinfo(targets.dtype)
        # As torch takes them: -1 is the largest number of a type without negative ones.
        wrapped = [int(label) % (limits.max + 1) if limits.min == 0 else int(label) for label in others]
        others = [*dict.fromkeys(label for label in wrapped if limits.min <= label <= limits.max)]
    for label in others:
        relabelled = targets.clone()
        relabelled[0] = label
        yield 0, synthetic_rows(inputs, rows), relabelled


def _same_but(row: int, one: Tensor, other: Tensor) -> bool:
    """Whether all other rows have the same sums, up to the rounding of kernels that divide work anew."""
    others = torch.arange(len(one)) != row
    scale = one[others].abs().amax((0, 1), keepdim=True)
    gap = (one[others] - other[others]).abs()
    return bool((gap <= _TOLERANCE * scale).all())


def _mixes(use: Use, names: Sequence[str]) -> str:
    return f"{use.operation.name} of {names[use.parameters[0]]} sees rows that depend on several rows of the batch"


def _never(
    signature: tuple[object, ...], methods: Callable[[], Sequence[NormMethod]], collect: Callable[[str], Material]
) -> Material:
    raise AssertionError("no material was wanted")
