"""Models that work side by side in this process, each in a thread of its own, on one GPU each or on the CPU's cores.

Threads are enough, since nearly all the time is spent in PyTorch, which lets the others go on meanwhile.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import ComputeSettings

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A model and its replicas."""

    def __init__(self, model: ResidentModel, compute: ComputeSettings) -> None:
        self.count = compute.workers or 1
        gpus = compute.device == "cuda"
        devices = [torch.device("cuda", number) if gpus else torch.device("cpu") for number in range(self.count)]
        self._models = [model, *(model.replica(device) for device in devices[1:])]

    def map(self, work: Callable[[ResidentModel, Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`work(model, item)` for every item, in the items' order.

        No more pieces of work are begun than there are workers, and one, ahead of the result that is taken: what they
        make does not pile up.
        """
        if self.count == 1:
            for item in items:
                yield work(self._models[0], item)
            return
        free: SimpleQueue[ResidentModel] = SimpleQueue()
        for model in self._models:
            free.put(model)

        def run(item: Item) -> Result:
            model = free.get()
            try:
                return work(model, item)
            finally:
                free.put(model)

        running: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(self.count, thread_name_prefix="fedrot-worker") as pool:
            try:
                for item in items:
                    running.append(pool.submit(run, item))
                    if len(running) > self.count:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                for future in running:
                    future.cancel()
