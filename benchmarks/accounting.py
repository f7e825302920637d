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


"""Time, memory and size of ε over the trainings that people run, beside Opacus's accountants.

    python -m benchmarks.accounting

Writes results/accounting.json and prints the tables. How the numbers come about:

- The grid: N from 500 to 200,000 patients, batches of 64 to 4,096, noise multipliers 0.5 to 10, 100 to 20,000 steps, δ =
  min(1e-5, 0.1 / N), every cell in which a batch is no larger than the cohort. Without ``--all``, a random 60 of them, the
  same each time.
- Each accountant of each cell runs in a process of its own, which is stopped after ``--timeout`` seconds, and whose peak of
  memory is taken. Ours is asked for ε after all steps, and then at half of them, as after an epoch; for the noise of a
  target ε; and for the steps that a budget affords.
- The reference for ε is the smallest upper bound that any accountant gives. Opacus's PRV has a lower bound as well (its
  upper one less its error); ours below that would be wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import platform
import random
import resource
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

RESULTS = Path(__file__).parent / "results" / "accounting.json"
PATIENTS = (500, 2_000, 5_000, 20_000, 50_000, 200_000)
BATCHES = (64, 256, 1_024, 4_096)
NOISE = (0.5, 0.8, 1.0, 2.0, 4.0, 10.0)
STEPS = (100, 1_000, 5_000, 20_000)
QUESTIONS = ("ours", "ours, after half the steps", "ours, noise for ε", "ours, steps for ε", "Opacus RDP", "Opacus PRV")
_PRV_ERROR = 0.01


def cells() -> list[dict[str, Any]]:
    """The grid."""
    return [
        {"patients": n, "batch": b, "noise": sigma, "steps": t, "delta": min(1e-5, 0.1 / n)}
        for n, b, sigma, t in itertools.product(PATIENTS, BATCHES, NOISE, STEPS)
        if b <= n
    ]


def ask(question: str, cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers with their seconds; one or two, since the first of ours warms what the second uses."""
    warnings.simplefilter("ignore")
    rate = cell["batch"] / cell["patients"]
    if question.startswith("Opacus"):
        from opacus.accountants import PRVAccountant, RDPAccountant

        accountant = RDPAccountant() if question.endswith("RDP") else PRVAccountant()
        accountant.history = [(cell["noise"], rate, cell["steps"])]
        return [_timed(lambda: float(accountant.get_epsilon(cell["delta"])))]
    from monai_privacy.accounting import (
        PrivacyBudget,
        affordable_steps,
        calibrate_noise_multiplier,
        dpsgd_event,
        epsilon,
    )

    def bound(steps: int) -> float:
        return epsilon(dpsgd_event(sample_rate=rate, noise_multiplier=cell["noise"], steps=steps), cell["delta"])

    if question == "ours":
        return [_timed(lambda: bound(cell["steps"])), _timed(lambda: bound(cell["steps"] // 2))]
    target = cell["target"]
    if question.endswith("noise for ε"):
        return [
            _timed(
                lambda: calibrate_noise_multiplier(
                    epsilon=target, delta=cell["delta"], sample_rate=rate, steps=cell["steps"]
                )
            )
        ]
    step = dpsgd_event(sample_rate=rate, noise_multiplier=cell["noise"]).event
    budget = PrivacyBudget(target, cell["delta"])
    return [_timed(lambda: float(affordable_steps(step, budget, at_most=2 * cell["steps"])))]


def _timed(answer: Any) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        found: dict[str, Any] = {"value": answer()}
    except Exception as error:  # an accountant's own limits
        found = {"error": f"{type(error).__name__}: {str(error)[:80]}"}
    return found | {"seconds": time.perf_counter() - start}


def _child(question: str, cell: dict[str, Any], pipe: Any, memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    answers = ask(question, cell)
    pipe.send((answers, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def in_a_process(question: str, cell: dict[str, Any], timeout: float, memory: int) -> dict[str, Any]:
    """What it says, how long it took, and its peak of memory in MB; or that it was stopped."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(question, cell, theirs, memory))
    process.start()
    theirs.close()
    try:
        answers, megabytes = ours.recv() if ours.poll(timeout) else (None, None)
    except EOFError:
        answers, megabytes = None, None
    process.kill()
    process.join()
    if answers is None:
        return {"answers": [{"error": "stopped", "seconds": timeout}], "megabytes": None}
    return {"answers": answers, "megabytes": megabytes}


def run(chosen: list[dict[str, Any]], timeout: float, memory: int) -> list[dict[str, Any]]:
    """All questions on all cells."""
    # Imported once, here: each process begins with a copy, so that no import is timed.
    import opacus.accountants  # noqa: F401

    import monai_privacy.accounting  # noqa: F401

    rows = []
    for cell in track(chosen, "cells", console=Console(stderr=True)):
        row: dict[str, Any] = {"cell": cell, "found": {}}
        for question in ("ours", "Opacus RDP", "Opacus PRV"):
            row["found"][question] = in_a_process(question, cell, timeout, memory)
        epsilon = row["found"]["ours"]["answers"][0].get("value")
        if epsilon is not None and 0.05 < epsilon < 50:
            for question in ("ours, noise for ε", "ours, steps for ε"):
                row["found"][question] = in_a_process(question, cell | {"target": epsilon * 0.9}, timeout, memory)
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A row a question: answered, seconds (median, 95th percentile, most), peak MB, ε over the smallest bound."""
    lines = []
    for question in QUESTIONS:
        name, index = ("ours", 1) if question == "ours, after half the steps" else (question, 0)
        found = [row["found"][name] for row in rows if name in row["found"]]
        answers = [each["answers"][min(index, len(each["answers"]) - 1)] for each in found]
        good = [answer for answer in answers if "value" in answer]
        seconds = sorted(answer["seconds"] for answer in answers)
        peaks = [each["megabytes"] for each in found if each["megabytes"]]
        lines.append(
            [
                question,
                f"{len(good)} of {len(answers)}",
                f"{statistics.median(seconds):.2f}",
                f"{seconds[int(0.95 * (len(seconds) - 1))]:.1f}",
                f"{seconds[-1]:.1f}",
                f"{max(peaks):.0f}",
                _looseness(rows, question),
            ]
        )
    return lines


def _looseness(rows: list[dict[str, Any]], question: str) -> str:
    if question not in ("ours", "Opacus RDP", "Opacus PRV"):
        return "–"
    ratios = []
    for row in rows:
        values = {name: row["found"][name]["answers"][0].get("value") for name in ("ours", "Opacus RDP", "Opacus PRV")}
        known = [value for value in values.values() if value]
        if values[question] and known:
            ratios.append(values[question] / min(known))
    return f"{statistics.median(ratios):.2f} ({max(ratios):.2f})"


def wrong(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells in which our bound lies below what Opacus's PRV proves, or no answer came."""
    found = []
    for row in rows:
        ours = row["found"]["ours"]["answers"][0].get("value")
        prv = row["found"]["Opacus PRV"]["answers"][0].get("value")
        if ours is None or (prv is not None and ours < prv - 2 * _PRV_ERROR):
            found.append(row["cell"] | {"ours": ours, "prv": prv})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The summary in markdown."""
    names = ["", "answered", "median s", "95 % s", "most s", "peak MB", "ε over smallest bound, median (most)"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in summary(rows))])


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every cell of the grid, which takes hours")
    parser.add_argument("--cells", type=int, default=60)
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--memory", type=int, default=8, help="GB that a process may take")
    options = parser.parse_args()
    grid = cells()
    chosen = grid if options.all else random.Random(0).sample(grid, min(options.cells, len(grid)))
    rows = run(chosen, options.timeout, options.memory * 2**30)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("monai-privacy", "dp-accounting", "opacus", "numpy", "scipy")},
        "grid": len(grid),
        "timeout": options.timeout,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "wrong": wrong(rows), "rows": rows}, indent=1), encoding="utf-8")
    console = Console()
    console.print(table(rows), soft_wrap=True, highlight=False)
    console.print(f"wrong, or without an answer of ours: {len(wrong(rows))} of {len(rows)} cells")


if __name__ == "__main__":
    main()
