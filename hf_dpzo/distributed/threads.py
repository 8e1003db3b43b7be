"""Work that is divided among as many threads as torch uses."""

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache

import torch


def divide(numbers: range, *, least: int) -> list[range]:
    """Divide `numbers` into consecutive shares, one for each thread that torch uses, of at least `least` each.

    >>> divide(range(8), least=100)
    [range(0, 8)]
    """
    threads = max(1, min(torch.get_num_threads(), len(numbers) // least))
    bounds = [len(numbers) * thread // threads for thread in range(threads + 1)]
    return [numbers[first:last] for first, last in itertools.pairwise(bounds)]


def run_together(tasks: Sequence[Callable[[], None]]) -> None:
    """Run each of `tasks` in a thread of its own, and wait for all of them; a single one runs in this thread.

    Raises:
        Exception: what the first task that fails raises, after all have ended.
    """
    if len(tasks) == 1:
        tasks[0]()
        return
    futures = [_get_thread_pool(torch.get_num_threads()).submit(task) for task in tasks]
    try:
        for future in futures:
            future.result()
    finally:
        wait(futures)  # Even after an error: no thread may still write to memory that the caller goes on to use.


@lru_cache(maxsize=1)
def _get_thread_pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="hf_dpzo")


# A forked process inherits the pool without its threads.
os.register_at_fork(after_in_child=_get_thread_pool.cache_clear)
