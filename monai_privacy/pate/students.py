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

"""Students of PATE: networks trained on public images, of which the teachers answered only a few."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader

from monai_privacy.pate.student_data import plain, split_answers, viewed

__all__ = ["FixMatchTrainer", "PseudoLabelLoss", "pseudo_label_loss", "split_answers"]


class PseudoLabelLoss(NamedTuple):
    """What unlabelled images add to the loss.

    Args:
        loss: scalar; 0 where no image passed.
        passed: (N,) whether the prediction was confident enough to be a label.
    """

    loss: Tensor
    passed: Tensor


def pseudo_label_loss(weak_logits: Tensor, strong_logits: Tensor, *, threshold: float) -> PseudoLabelLoss:
    """Teach the strongly augmented view of each image what the network is sure of in the weakly augmented one.

    The mean over all images, those that did not pass included, of the cross-entropy of the strong view against the
    likeliest class of the weak view, where its probability is at least ``threshold``.

    Args:
        weak_logits: (N, K) of the weak views; no gradient flows through them.
        strong_logits: (N, K) of the strong views.
        threshold: τ, a probability.

    Reference: Sohn et al. 2020 (arXiv:2001.07685), equation 4.
    """
    # Not in half precision, where 0.95 and 0.9502 are one number.
    confidence, labels = weak_logits.float().softmax(dim=1).max(dim=1)
    passed = confidence >= threshold
    each = F.cross_entropy(strong_logits.float(), labels, reduction="none")
    return PseudoLabelLoss(torch.where(passed, each, 0.0).mean(), passed)


class FixMatchTrainer(SupervisedTrainer):
    """Semi-supervised training by FixMatch, for a student that has many public images and few private labels.

    In each iteration the network sees a weak view of every labelled image, and a weak and a strong view of every image of
    an unlabelled batch, all in one call, so that batch norm has one mean and variance for all of them. The loss is
    ``loss_function`` on the labelled images plus ``unlabelled_weight`` times :func:`pseudo_label_loss`.

    Privacy: the student sees public images, and labels that were released with a guarantee. Whatever is made of them is
    post-processing and costs nothing more, with as many epochs, students and settings as one likes. This holds no longer
    once hospital labels are used again: to evaluate, to stop early or to choose a student on them is another release.

    Args:
        device: see ``SupervisedTrainer``.
        max_epochs: see ``SupervisedTrainer``. An epoch is one pass over the labelled images; a few dozen of them make
            short epochs, so that some thousand iterations need many, or a larger ``epoch_length``.
        train_data_loader: labelled images, as ``SupervisedTrainer`` takes them.
        network: see ``SupervisedTrainer``; gives logits (B, K), K at least 2.
        optimizer: see ``SupervisedTrainer``.
        loss_function: see ``SupervisedTrainer``; on labelled images only.
        unlabelled_loader: public images without labels, in the same form (labels in it are ignored); read again from its
            start when it ends. Its batches are usually larger, 7 times in the paper. It may hold the labelled images too.
        weak: random transform for each row, as flips and small shifts. Gets one row of a batch in the form in which the
            loader gives it: a dictionary, without its batch axis (for MONAI's dictionary transforms), or else the image
            alone, (C, *spatial). Values of a dictionary that it returns replace those of the batch.
        strong: like ``weak``, for the views that are learnt from: large distortions, noise, erased parts. Where the
            loader's workers make both views, ``lambda row: {"image": row["strong"]}`` takes the one that is ready.
        threshold: least probability of a prediction that becomes a label.
        unlabelled_weight: λ, what the unlabelled images weigh.
        kwargs: the other arguments of ``SupervisedTrainer``, unchanged in meaning; not ``iteration_update`` and
            ``accumulation_steps``. ``prepare_batch`` is called on unlabelled batches too.

    Raises:
        ValueError: for such arguments and for numbers out of range; from ``run``, where the network gives no logits of
            two classes or more, and where ``unlabelled_loader`` gives nothing.

    ``engine.state.output`` has, beside the labelled rows' image, label, prediction and the loss, ``unlabelled_loss`` and
    ``pseudo_labels``, the number of unlabelled images that passed the threshold in this step. The paper evaluates a moving
    average of the weights (``ignite.handlers.EMAHandler``, momentum 0.001) and decays the learning rate by a cosine.

    Reference: Sohn et al. 2020, "FixMatch: simplifying semi-supervised learning with consistency and confidence"
        (arXiv:2001.07685), Algorithm 1. That training on the answers is free: Papernot et al. 2017 (arXiv:1610.05755).
    """

    def __init__(
        self,
        device: str | torch.device,
        max_epochs: int,
        train_data_loader: Iterable | DataLoader,
        network: nn.Module,
        optimizer: Optimizer,
        loss_function: Callable,
        *,
        unlabelled_loader: Iterable,
        weak: Callable[[Any], Any],
        strong: Callable[[Any], Any],
        threshold: float = 0.95,
        unlabelled_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("iteration_update") is not None or kwargs.get("accumulation_steps", 1) != 1:
            raise ValueError(
                "iteration_update and accumulation_steps would replace or divide the step that FixMatch is. Leave them out; "
                "use a SupervisedTrainer for another step, and smaller unlabelled batches to save memory."
            )
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(
                f"threshold is {threshold}, which is no probability. Give a number from 0 to 1; 0.95 is usual."
            )
        if not (unlabelled_weight >= 0.0 and math.isfinite(unlabelled_weight)):
            raise ValueError(
                f"unlabelled_weight is {unlabelled_weight}, but must be finite and at least 0; 1 is usual."
            )
        super().__init__(device, max_epochs, train_data_loader, network, optimizer, loss_function, **kwargs)
        self.unlabelled_loader = unlabelled_loader
        self.weak = weak
        self.strong = strong
        self.threshold = threshold
        self.unlabelled_weight = unlabelled_weight
        self._unlabelled: Iterator[Any] | None = None

    def _iteration(self, engine: Any, batchdata: Any) -> Any:
        """One step on a labelled batch and the next unlabelled one."""
        if batchdata is None:
            raise ValueError("Must provide batch data for current iteration.")
        unlabelled = self._next_unlabelled()
        inputs, targets = self._prepared(viewed(self.weak, batchdata))
        views = [inputs, *(self._prepared(viewed(change, unlabelled))[0] for change in (self.weak, self.strong))]
        sizes = [len(view) for view in views]
        engine.state.output = {Keys.IMAGE: inputs, Keys.LABEL: targets}

        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=engine.optim_set_to_none)
        scaler = engine.scaler if engine.amp else None
        with contextlib.nullcontext() if scaler is None else torch.autocast("cuda", **engine.amp_kwargs):
            logits = engine.inferer(torch.cat(views), engine.network)
            labelled, weak, strong = _checked_logits(logits, sum(sizes)).split(sizes)
            engine.state.output[Keys.PRED] = labelled
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            loss = engine.loss_function(labelled, targets).mean()
            found = pseudo_label_loss(weak, strong, threshold=self.threshold)
            loss = loss + self.unlabelled_weight * found.loss
            engine.state.output |= {
                Keys.LOSS: loss,
                "unlabelled_loss": found.loss.detach(),
                "pseudo_labels": int(found.passed.sum()),
            }
            engine.fire_event(IterationEvents.LOSS_COMPLETED)
        (loss if scaler is None else scaler.scale(loss)).backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if scaler is None:
            engine.optimizer.step()
        else:
            scaler.step(engine.optimizer)
            scaler.update()
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def _next_unlabelled(self) -> Any:
        for _ in range(2):
            if self._unlabelled is None:
                self._unlabelled = iter(self.unlabelled_loader)
            try:
                return next(self._unlabelled)
            except StopIteration:
                self._unlabelled = None
        raise ValueError(
            "unlabelled_loader gives no batch, or can be read only once. Give a loader over one or more images that "
            "starts again each time."
        )

    def _prepared(self, batch: Any) -> tuple[Tensor, Any]:
        prepared = self.prepare_batch(batch, self.state.device, self.non_blocking, **self.to_kwargs)
        if len(prepared) != 2:
            raise ValueError(
                f"prepare_batch gives {len(prepared)} values, but labelled and unlabelled rows go through the network "
                "together, with images alone. Give a prepare_batch that returns images and labels."
            )
        return plain(prepared[0]), prepared[1]


def _checked_logits(logits: Any, rows: int) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != rows or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the network gives {shape} for {rows} images, but FixMatch needs logits (B, K) of at least 2 classes. Give the "
            "network one output for each class."
        )
    return logits
