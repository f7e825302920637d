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

"""Votes as parts of MONAI's own ensembles: a post-processing transform, and a handler for whole batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.transforms import MapTransform
from torch import Tensor

from monai_privacy.pate.engine import most_likely_class
from monai_privacy.pate.labelling import VoteLabeller, query_digest
from monai_privacy.provenance import network_digest

__all__ = ["PrivateVoteHandler", "PrivateVoted"]

Vote = Callable[[Tensor, int], Tensor]


class PrivateVoted(MapTransform):
    """Turns the predictions of several teachers on one image into a label by private vote, and writes over them.

    For the ``postprocessing`` of ``monai.engines.EnsembleEvaluator``, where ``VoteEnsembled`` would stand: that one gives
    the exact majority, which tells about every patient.

    Args:
        keys: the predictions, one key a teacher; all teachers that the labeller was made for.
        labeller: charges, answers and remembers.
        num_classes: number of classes.
        image_key: the image, which names the query.
        output_key: where the label goes, an integer tensor; -1 where there is no answer.
        vote: from predictions of shape (rows, classes) to counts; :func:`~monai_privacy.pate.engine.most_likely_class` by
            default.
    """

    def __init__(
        self,
        keys: Sequence[str],
        labeller: VoteLabeller,
        *,
        num_classes: int = 2,
        image_key: str = "image",
        output_key: str = "pred",
        vote: Vote = most_likely_class,
    ) -> None:
        super().__init__(keys)
        _require_different(self.keys)
        self.labeller = labeller
        self.num_classes = num_classes
        self.image_key = image_key
        self.output_key = output_key
        self.vote = vote

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The same dictionary with the label, also in place of each prediction."""
        output = dict(data)
        predictions = [torch.as_tensor(output[key])[None] for key in self.keys]
        votes = _counted(predictions, self.num_classes, self.vote, self.labeller)
        label = self.labeller.label([query_digest(output[self.image_key])], votes).labels[0]
        # Not deleted: MONAI's engines keep in state.output whatever a transform takes out of the dictionary.
        return output | dict.fromkeys((*self.keys, self.output_key), label)


class PrivateVoteHandler:
    """The same for each batch of an ``EnsembleEvaluator``, before anything else sees the predictions.

    Attach it first: it works when the model has been run, and replaces the predictions in ``engine.state.output``.

    Args:
        labeller: charges, answers and remembers.
        pred_keys: the evaluator's ``pred_keys``.
        num_classes: number of classes.
        image_key: the image, which names the query.
        output_key: where the labels go, shape (batch,).
        vote: as of :class:`PrivateVoted`.
    """

    def __init__(
        self,
        labeller: VoteLabeller,
        pred_keys: Sequence[str],
        *,
        num_classes: int = 2,
        image_key: str = "image",
        output_key: str = "pred",
        vote: Vote = most_likely_class,
    ) -> None:
        self.labeller = labeller
        self.pred_keys = tuple(pred_keys)
        _require_different(self.pred_keys)
        self.num_classes = num_classes
        self.image_key = image_key
        self.output_key = output_key
        self.vote = vote

    def attach(self, engine: Engine) -> None:
        """Answer each batch as soon as all teachers have seen it.

        Raises:
            ValueError: where another handler would see the predictions first, or two networks have the same weights.
        """
        if getattr(engine, "_event_handlers", {}).get(IterationEvents.FORWARD_COMPLETED):
            raise ValueError("another handler would see every teacher's predictions. Attach this handler first.")
        networks = [network_digest(network) for network in getattr(engine, "networks", ())]
        if len(set(networks)) != len(networks):
            raise ValueError("two networks of the ensemble have the same weights: a patient would move several votes.")
        # MONAI's post-processing is attached to MODEL_COMPLETED when the evaluator is made, and so runs before any handler.
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._require_gone)

    def __call__(self, engine: Engine) -> None:
        """Replace the predictions of the current batch by labels."""
        output = engine.state.output
        if not isinstance(output, dict):
            raise ValueError(f"state.output is {type(output).__name__}, but an EnsembleEvaluator's is a dictionary.")
        missing = [key for key in self.pred_keys if key not in output]
        if missing:
            raise ValueError(f"state.output has no {', '.join(missing)}: give the evaluator's pred_keys, all of them.")
        predictions = [output.pop(key) for key in self.pred_keys]
        votes = _counted(predictions, self.num_classes, self.vote, self.labeller)
        names = [query_digest(image) for image in output[self.image_key]]
        output[self.output_key] = self.labeller.label(names, votes).labels

    def _require_gone(self, engine: Engine) -> None:
        items = engine.state.output if isinstance(engine.state.output, list) else [engine.state.output]
        if any(isinstance(item, dict) and key in item for item in items for key in self.pred_keys):
            raise ValueError("the predictions of the teachers are still in state.output. Attach this handler first.")


def _require_different(keys: Sequence[Hashable]) -> None:
    if len(set(keys)) != len(keys):
        raise ValueError(
            f"a prediction is named twice among {list(keys)}: a patient would move two votes. Name each once."
        )


def _counted(predictions: Sequence[Tensor], num_classes: int, vote: Vote, labeller: VoteLabeller) -> Tensor:
    total = torch.zeros(len(predictions[0]), num_classes, dtype=torch.int64)
    for number, prediction in enumerate(predictions):
        if not bool(torch.isfinite(prediction).all()):
            raise ValueError(
                f"teacher {number} gives scores that are not finite: it cannot vote, and every teacher must. Train it "
                "again; nothing was charged."
            )
        votes = vote(prediction.detach().float().cpu(), num_classes).long()
        if votes.shape != total.shape:
            raise ValueError(f"the vote function gives shape {tuple(votes.shape)}, not {tuple(total.shape)}.")
        labeller.check_ballots(votes)
        total += votes
    return total
