"""Work spread over threads, each on one core: for compiled loops, which release Python's lock, and torch between them.

There are as many as torch has threads, so one setting governs both. Who does what has no bearing on the result: a task
writes what no other task touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

Task = TypeVar("Task")


def spread(work: Callable[[Task], object], tasks: Iterable[Task]) -> None:
    """Call `work` with each task, on all cores, in about their order. An exception of one is raised here."""
    num_threads = torch.get_num_threads()
    waiting = list(tasks)
    if num_threads == 1 or len(waiting) < 2:
        for task in waiting:
            work(task)
        return
    grad_mode = torch.is_grad_enabled()

    def with_mode(task: Task) -> None:
        with torch.set_grad_enabled(grad_mode):
            work(task)

    for done in _pool(num_threads).map(with_mode, waiting):
        del done


@lru_cache(maxsize=1)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    """`torch.set_num_threads` holds for the calling thread and for threads that are yet to begin: the workers are
    started at once and take one core each, then the setting is put back."""
    everyone_there = Barrier(num_threads)

    def begin() -> None:
        torch.get_num_threads()  # A thread takes over the setting at its first call: let that be behind it.
        torch.set_num_threads(1)
        everyone_there.wait()

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="rorqual-kernels", initializer=begin)
    for started in [pool.submit(int) for _ in range(num_threads)]:
        started.result()
    torch.set_num_threads(num_threads)
    return pool
