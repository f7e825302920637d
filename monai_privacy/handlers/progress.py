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

"""A progress bar that tells nothing about the data."""

from __future__ import annotations

from ignite.engine import Engine, Events
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from monai_privacy.engines import DPSupervisedTrainer
from monai_privacy.report import rounded_up


class PrivacyProgressHandler:
    """Shows epoch, steps, ε and the time left. No loss: the training loss is not noised.

    ε is that of the whole ledger, at the plan's δ, after the last finished epoch, and says so: the steps since then have
    cost more, and finding ε takes too long to do it at each step. Where the output is no terminal, prints one line for
    each epoch.

    Args:
        description: what is being trained, in a word or two.
        console: where to write; the standard error output where None.
    """

    def __init__(self, description: str = "private training", console: Console | None = None) -> None:
        self.description = description
        # Not rich's notebook display: it prints a block for each line.
        self._console = Console(stderr=True, force_jupyter=False) if console is None else console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),  # all of it in 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[spent]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(description, total=None, spent="")

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: a trainer; ε is shown for a :class:`DPSupervisedTrainer`.
        """
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._show_epoch)
        engine.add_event_handler(Events.COMPLETED, self._stop)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, engine: Engine) -> None:
        epochs, length = engine.state.max_epochs, engine.state.epoch_length
        total = epochs * length if epochs and length else None
        self._progress.update(self._task, total=total, completed=engine.state.iteration)
        self._progress.start()

    def _advance(self, engine: Engine) -> None:
        epoch = f"{self.description}, epoch {engine.state.epoch}/{engine.state.max_epochs}"
        self._progress.update(self._task, completed=engine.state.iteration, description=epoch)

    def _show_epoch(self, engine: Engine) -> None:
        spent = ""
        if isinstance(engine, DPSupervisedTrainer):
            epsilon = f"ε {rounded_up(engine.ledger.epsilon(engine.plan.delta), 2)}"
            # At once: on a busy machine a short epoch would otherwise pass between two pictures of the bar.
            self._progress.update(self._task, spent=f"{epsilon} after epoch {engine.state.epoch}", refresh=True)
            spent = f"{epsilon} at δ {engine.plan.delta:g}"
        if not self._console.is_terminal:
            line = f"{self.description}: epoch {engine.state.epoch}/{engine.state.max_epochs}  {spent}".rstrip()
            self._console.print(line, highlight=False)

    def _stop(self, engine: Engine) -> None:
        self._progress.stop()

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self._progress.stop()
        raise error
