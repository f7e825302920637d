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

"""The report, kept up to date while training goes on."""

from __future__ import annotations

import time
from pathlib import Path

from ignite.engine import Engine, Events

from monai_privacy.engines import DPSupervisedTrainer
from monai_privacy.report import PrivacyReport

# Of the time of one report, between two.
_SHARE = 19.0


class PrivacyReportHandler:
    """Writes ``privacy_report.json`` and ``.md``, recomputed from the ledger, after epochs, and ``.html`` at the end.

    The first epoch is reported, and later ones as often as costs at most a twentieth of the time; the end always is.

    Args:
        output_dir: folder for the files; made where missing.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = Path(output_dir)
        self._again_at = 0.0

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
        # Each epoch: a run that dies leaves checkpoints, and beside them a report that says which ledger line it knew.
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def __call__(self, engine: DPSupervisedTrainer) -> None:
        """
        Args:
            engine: a :class:`DPSupervisedTrainer`.
        """
        # The first epoch, and then as often as costs at most a twentieth of the run: small epochs are shorter than a report.
        if time.monotonic() < self._again_at:
            return
        began = time.monotonic()
        self._write(engine, html=False)
        self._again_at = time.monotonic() + _SHARE * (time.monotonic() - began)

    def finish(self, engine: DPSupervisedTrainer) -> None:
        """Commit the run's entry, so that the report names the model, and write the page for people as well.

        Args:
            engine: a :class:`DPSupervisedTrainer`.
        """
        engine.end_ledger_entry()
        # At the end alone: its pictures take longer than a small epoch.
        self._write(engine, html=True)

    def _write(self, engine: DPSupervisedTrainer, *, html: bool) -> None:
        if engine.state.rank == 0:
            PrivacyReport.from_ledger(engine.ledger).write(self.output_dir, html=html)
