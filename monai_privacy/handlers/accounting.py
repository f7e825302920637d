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

"""ε among the metrics of the engine, where every MONAI logger finds it."""

from __future__ import annotations

from ignite.engine import Engine, Events

from monai_privacy.accounting.ledger import PrivacyLedger
from monai_privacy.engines import DPSupervisedTrainer


class PrivacyAccountingHandler:
    """Puts ε of everything on the ledger into ``engine.state.metrics`` after each epoch.

    StatsHandler, TensorBoardStatsHandler and MetricLogger then show it beside the other metrics of the trainer.

    Args:
        name: name of the metric.
    """

    def __init__(self, name: str = "epsilon") -> None:
        self.name = name

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: a :class:`DPSupervisedTrainer`.
        """
        if not isinstance(engine, DPSupervisedTrainer):
            raise ValueError(
                f"{type(self).__name__} is attached to a {type(engine).__name__}: it has no ledger. Attach it to a "
                "DPSupervisedTrainer."
            )
        # Not EPOCH_COMPLETED: loggers attached before this handler would show the ε of the epoch before.
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: DPSupervisedTrainer) -> None:
        """
        Args:
            engine: a :class:`DPSupervisedTrainer`.
        """
        ends_early = bool(engine.should_terminate_single_epoch)
        if ends_early or engine.state.iteration % engine.state.epoch_length == 0:
            ledger: PrivacyLedger = engine.ledger
            engine.state.metrics[self.name] = ledger.epsilon(engine.plan.delta)
