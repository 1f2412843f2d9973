"""One function over many items, by as many processes as there are cores, in order.

Guarantees: results come in the order of the items; at most two items a process are taken ahead; an exception of the
function is raised here. Where there is one item or one core nothing is started. The processes need no guarded
`__main__` in the caller's script, leave SIGINT and SIGTERM to the caller, and end with it however it ends.
Refuses (CorpusError): to go on when a process was killed.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import loky
from loky.process_executor import BrokenProcessPool

from cvm_translator.errors import CorpusError
from cvm_translator.runs.followers import follow

Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_PER_WORKER = 2
MAX_WORKERS = 16
"""The caller reads and writes what they work on, and is busy with so many."""


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int | None = None
) -> Iterator[Result]:
    """`function(item)` for each item; the function and the items must be picklable."""
    items = iter(items)
    num_workers = num_workers or min(loky.cpu_count(), MAX_WORKERS)
    first = list(itertools.islice(items, num_workers))
    items, num_workers = itertools.chain(first, items), min(num_workers, len(first))
    if num_workers < 2:
        yield from map(function, items)
        return
    executor = loky.ProcessPoolExecutor(num_workers, initializer=follow, initargs=(os.getpid(),))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) == ITEMS_PER_WORKER * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise CorpusError(
            "a process that worked on the text was killed, most likely for want of memory: make room in memory, or give"
            " fewer cores (taskset)"
        ) from error
    finally:
        executor.shutdown(wait=True, kill_workers=True)
