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

"""Time and memory of one private training step, as ratios to plain training, with every contender in one run.

    python -m benchmarks.clipping

Writes results/clipping_<device>.json and prints the table. How the numbers come about:

- A step is everything between two batches: forward, backward, clipping, noise, the optimizer's step.
- The contenders take turns, with a step of plain training before and after each; two steps of each are not counted (ours
  measures its methods in the first, and the second is the first to ask the system for what these take). A ratio is the
  median over the rounds of a step's time over the mean of its two neighbours', so that a machine whose speed drifts changes
  little. Each contender has a process of its own, whose C library keeps what is freed: whether a large tensor is fetched
  anew from the system, at a page fault for each 4 KB, hangs by chance on what else lies in memory, and made the same
  contender half as slow again in one process as in the next. All of them are in memory at once; where it does not
  hold them (24 GB do not for the 3D ResNet-18), ``--contenders`` takes some of them, and leaves the others' numbers.
- Memory is the peak of the process above the loaded network over the first two steps, what a contender tries out in the
  first one included, each contender in a process of its own; and beside it the peak of torch's own tensors in the third
  step, which leaves out what the C library keeps in pieces. On a GPU both are the device's own peak. On a CPU freed memory
  goes back to the system here, other than for the times, so that a peak is what was in use.
- Batch norm is group norm in every contender. Opacus gets a copy of the network with nothing in place, since its hooks
  refuse MONAI's networks as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import DenseNet121, resnet18
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import CONTENDERS
from monai_privacy.mechanisms.clipping.clipper import _give_back_memory
from monai_privacy.networks import ResNet9, convert_batch_norm

RESULTS = Path(__file__).parent / "results"
_ENDED = "its process ended"
# Seconds: the threads of the contender before look for work a while longer.
_REST = 0.05


def _resnet18(spatial_dims: int) -> nn.Module:
    return convert_batch_norm(resnet18(spatial_dims=spatial_dims, n_input_channels=1, num_classes=2))


def _densenet(spatial_dims: int) -> nn.Module:
    return convert_batch_norm(DenseNet121(spatial_dims=spatial_dims, in_channels=1, out_channels=2))


def _part_of_resnet18(*trained: str) -> nn.Module:
    return _only(_resnet18(2), *trained)


def _only(network: nn.Module, *trained: str) -> nn.Module:
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    return network


class _LowRank(nn.Module):
    """A frozen convolution with a trained change of low rank beside it."""

    def __init__(self, convolution: nn.Conv2d, rank: int = 4) -> None:
        super().__init__()
        self.frozen = convolution.requires_grad_(False)
        kept = {"stride": convolution.stride, "padding": convolution.padding, "bias": False}
        self.down = nn.Conv2d(convolution.in_channels, rank, convolution.kernel_size, **kept)  # type: ignore[arg-type]
        self.up = nn.Conv2d(rank, convolution.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.frozen(x) + self.up(self.down(x))
        return changed


def _with_low_rank() -> nn.Module:
    network = _resnet18(2)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d) and not isinstance(module, _LowRank):
                setattr(module, name, _LowRank(child))
    return _only(network, ".down.", ".up.", "fc.")


# Name: network, shape of an image, images in a batch.
Case = tuple[Callable[[], nn.Module], tuple[int, ...], int]
NETWORKS: dict[str, Case] = {
    "ResNet9 224²": (partial(ResNet9, spatial_dims=2, in_channels=1, out_channels=2), (1, 224, 224), 16),
    "DenseNet121 224²": (partial(_densenet, 2), (1, 224, 224), 8),
    "ResNet-18 224²": (partial(_resnet18, 2), (1, 224, 224), 8),
    "ResNet-18 3D 64³": (partial(_resnet18, 3), (1, 64, 64, 64), 8),
    "DenseNet121 3D 64³": (partial(_densenet, 3), (1, 64, 64, 64), 4),
    "ResNet-18 224², head only": (partial(_part_of_resnet18, "fc."), (1, 224, 224), 8),
    "ResNet-18 224², biases only": (partial(_part_of_resnet18, "bias"), (1, 224, 224), 8),
    "ResNet-18 224², norms and head": (partial(_part_of_resnet18, "bn", "downsample.1", "fc."), (1, 224, 224), 8),
    "ResNet-18 224², LoRA": (_with_low_rank, (1, 224, 224), 8),
    "ResNet-18 224², last stage": (partial(_part_of_resnet18, "layer4", "fc."), (1, 224, 224), 8),
}


def batch(shape: Sequence[int], rows: int, device: str) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((rows, *shape), generator=generator)
    return images.to(device), torch.randint(0, 2, (rows,), generator=generator).to(device)


@dataclass
class Timing:
    """Steps of a contender between steps of plain training.

    Args:
        seconds: of each step.
        plain: of the plain steps before and after it, their mean.
    """

    seconds: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over the pairs."""
        return statistics.median(own / plain for own, plain in zip(self.seconds, self.plain, strict=True))


def times(case: Case, contenders: Sequence[str], repeats: int, device: str, amp: bool) -> dict[str, Timing | str]:
    """Time each contender's steps, in turns; or say why a contender could not run."""
    found: dict[str, Timing | str] = {}
    with contextlib.ExitStack() as stack:
        running: dict[str, _Contender] = {}
        for contender in ("plain", *contenders):
            running[contender] = stack.enter_context(contextlib.closing(_Contender(case, contender, device, amp)))
            found[contender] = running[contender].fault or Timing()
        plain = found.pop("plain")
        assert isinstance(plain, Timing), plain
        for _ in range(repeats):
            before = running["plain"].seconds()
            for contender, timing in found.items():
                if isinstance(timing, str):
                    continue
                try:
                    seconds = running[contender].seconds()
                except EOFError:  # killed, where memory is scarce; the others go on
                    found[contender] = _ENDED
                    continue
                after = running["plain"].seconds()
                timing.seconds.append(seconds)
                timing.plain.append((before + after) / 2)
                before = after
    return found


class _Contender:
    """A training in a process of its own, which takes a step when it is told to; it has taken two already.

    Attributes:
        fault: why it cannot run; empty where it can.
    """

    def __init__(self, case: Case, contender: str, device: str, amp: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        arguments = (there, case, contender, device, amp, torch.get_num_threads())
        self._process = context.Process(target=_take_steps, args=arguments, daemon=True)
        with _allocator(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(1 << 40)):
            self._process.start()
        there.close()
        try:
            self.fault: str = self._pipe.recv()
        except EOFError:
            self.fault = _ENDED

    def seconds(self) -> float:
        """What the next step takes.

        Raises:
            EOFError: where its process has ended.
        """
        try:
            self._pipe.send(True)
            taken: float = self._pipe.recv()
        except OSError as error:
            raise EOFError(_ENDED) from error
        return taken

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.join()


@contextlib.contextmanager
def _allocator(**settings: str) -> Iterator[None]:
    """For processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _take_steps(pipe: Connection, case: Case, contender: str, device: str, amp: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    make, shape, rows = case
    torch.manual_seed(0)
    network = make().to(device).train()
    try:
        step = CONTENDERS[contender](network, *batch(shape, rows, device), amp)
        for _ in range(2):
            step()
    except Exception as error:  # a contender's own limits
        pipe.send(f"{type(error).__name__}: {str(error)[:100]}")
        return
    pipe.send("")
    with contextlib.suppress(EOFError):
        while pipe.recv():
            time.sleep(_REST)
            pipe.send(_seconds(step, device))


def _seconds(step: Callable[[], None], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def memory(name: str, contender: str, device: str, amp: bool) -> tuple[float, float] | None:
    """Peak MB above the loaded network, of the process and of its tensors; None where the contender cannot run."""
    # Freed memory goes back to the system at once, so that the peak is what was in use. Not for small pieces: a page fault
    # for each of them made these steps thirty times as slow.
    giving_back = _allocator(MALLOC_MMAP_THRESHOLD_="1048576", MALLOC_TRIM_THRESHOLD_="1048576")
    with giving_back, multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, contender, device, amp, torch.get_num_threads()))


def _peak(name: str, contender: str, device: str, amp: bool, threads: int) -> tuple[float, float] | None:
    torch.set_num_threads(threads)
    make, shape, rows = NETWORKS[name]
    torch.manual_seed(0)
    network = make().to(device).train()
    images, labels = batch(shape, rows, device)
    try:
        # The libraries' own memory is there before the count begins.
        plain = CONTENDERS["plain"](make().to(device).train(), images[:1], labels[:1], amp)
        plain()
        del plain
        gc.collect()
        _give_back_memory()  # so that no peak is made of it
        step = CONTENDERS[contender](network, images, labels, amp)
        before = _reset_peak(device)
        for _ in range(2):
            step()
        process = (_read_peak(device) - before) / 2**20
        return process, process if device == "cuda" else _tensor_peak(step)
    except Exception:  # told by the times
        return None


def _tensor_peak(step: Callable[[], None]) -> float:
    """Peak MB of what torch allocated on the CPU in a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


def _reset_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    return _status("VmRSS")


def _read_peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the numbers were made on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": threads,
        "versions": {name: version(name) for name in ("torch", "monai", "opacus", "monai-privacy")},
    }


def _processor(device: str) -> str:
    """Its name; rows of one table may come from several machines."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor() or platform.machine()


def table(results: dict[str, Any]) -> str:
    """Ratios to plain training: time, and in brackets peak memory of the process and of tensors."""
    contenders = list(dict.fromkeys(contender for row in results["rows"].values() for contender in row["contenders"]))
    lines = ["| | " + " | ".join(contenders) + " |", "|---" * (len(contenders) + 1) + "|"]
    for name, row in results["rows"].items():
        lines.append("| " + " | ".join([name, *(_cell(row, contender) for contender in contenders)]) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], contender: str) -> str:
    found = row["contenders"].get(contender, {})
    if "ratio" not in found:
        return "–"
    text = f"{found['ratio']:.2f}"
    if found.get("megabytes") and row["plain_megabytes"]:
        both = zip(found["megabytes"], row["plain_megabytes"], strict=True)
        text += f" ({', '.join(f'{own / plain:.2f}' for own, plain in both)})"
    return text


def _timed(before: dict[str, Any] | None, name: str, contenders: Sequence[str], *settings: Any) -> dict[str, Any]:
    """The row anew; contenders that are not among these stay, where they were timed on such a machine."""
    row: dict[str, Any] = {"machine": _processor(settings[1]), "plain_megabytes": None, "contenders": {}}
    if before is not None and before["machine"] == row["machine"]:
        row["contenders"] = {key: found for key, found in before["contenders"].items() if key not in contenders}
    for contender, timing in times(NETWORKS[name], contenders, *settings).items():
        said = {"error": timing} if isinstance(timing, str) else asdict(timing) | {"ratio": timing.ratio}
        row["contenders"][contender] = said
    row["contenders"] = {key: row["contenders"][key] for key in CONTENDERS if key in row["contenders"]}
    return row


def _add_memory(row: dict[str, Any], name: str, contenders: Sequence[str], device: str, amp: bool) -> None:
    row["plain_megabytes"] = memory(name, "plain", device, amp)
    row["memory_machine"] = _processor(device)
    for contender, found in row["contenders"].items():
        found.pop("megabytes", None)  # of another run, whose plain training was another
        if "ratio" in found and contender in contenders:
            found["megabytes"] = memory(name, contender, device, amp)


def _save(results: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(results, indent=1), encoding="utf-8")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS), metavar="NAME")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-times", action="store_true", help="add the memory to rows that were timed before")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contenders = [contender for contender in options.contenders if contender != "plain"]
    settings = (options.repeats, options.device, options.amp)
    output = options.output or RESULTS / f"clipping_{options.device}{'_bf16' if options.amp else ''}.json"
    results: dict[str, Any] = {
        "machine": machine(options.device, options.threads),
        "rows": {},
    }
    if output.exists():  # a run of some networks leaves the rows of the others
        results["rows"] = json.loads(output.read_text(encoding="utf-8"))["rows"]
    console = Console()
    for name in options.networks:
        with console.status(f"{name} ..."):
            if not options.no_times:
                results["rows"][name] = _timed(results["rows"].get(name), name, contenders, *settings)
                _save(results, output)
            if not options.no_memory:
                _add_memory(results["rows"][name], name, contenders, options.device, options.amp)
                _save(results, output)
        console.print(table({"rows": {name: results["rows"][name]}}), soft_wrap=True, highlight=False)
    heading = "\ntime of a step over that of plain training (peak memory of the process and of tensors likewise)\n\n"
    console.print(heading + table(results), soft_wrap=True)


if __name__ == "__main__":
    main()
