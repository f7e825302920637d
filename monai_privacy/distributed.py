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

"""Several processes that make one private step together."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Of a thread that has only to be scheduled and to free some tensors, and short at the end of a run.
_SECONDS_TO_LET_GO = 0.2


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those of the run; alone where ``torch.distributed`` is not initialised.

    Args:
        rank: number of this process. The first one, 0, keeps the ledger and adds the noise.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> ProcessGroup:
        """The group that ``torch.distributed`` knows now."""
        if dist.is_available() and dist.is_initialized():
            atexit.unregister(_let_others_finish)  # once, however many trainers there are
            atexit.register(_let_others_finish)
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        """Whether this process keeps the ledger and adds the noise."""
        return self.rank == 0

    def first_says(self, question: Callable[[], T]) -> T:
        """What the first process answers, in all of them; an exception there is raised in all of them."""
        if self.size == 1:
            return question()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer = [question(), None]
            except Exception as error:
                answer = [None, error]
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]  # type: ignore[no-any-return]

    def first_does(self, action: Callable[[], Any]) -> None:
        """Wait until the first process has done ``action``; where it fails, all of them fail."""
        self.first_says(action)

    def all_agree(self, value: Any) -> bool:
        """Whether every process has an equal ``value``."""
        if self.size == 1:
            return True
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return all(other == value for other in values)

    def sum(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The sum of each tensor over the processes."""
        if self.size == 1:
            return tensors
        # What is added up is memory: in one process a gradient may lie channels-last, and in another it may not.
        tensors = [tensor.contiguous() for tensor in tensors]
        for tensor in tensors:
            dist.all_reduce(tensor)
        return tensors


def _let_others_finish() -> None:
    """Let the threads of gloo have the interpreter while there is one.

    Such a thread lets go of a collective's tensors some time after the collective, and where a barrier follows, after
    the barrier. To free them it needs the interpreter: where that is ending, the process aborts, and torchrun says of
    a run that is complete that it failed, and ends the other processes
    (https://github.com/pytorch/pytorch/issues/190489). ``destroy_process_group`` waits for the threads only where
    nothing else holds the group, and ``DistributedDataParallel`` does; no other call waits for them.
    """
    time.sleep(_SECONDS_TO_LET_GO)
