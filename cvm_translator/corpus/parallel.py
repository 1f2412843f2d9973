"""One function over many items, by as many processes as there are cores, in order.

Guarantees: results come in the order of the items; at most two items a process wait, whatever their number; an
exception of the function is raised here. Where there is one item or one core nothing is started. The processes need no
guarded `__main__` in the caller's script, leave SIGINT to the caller and end with it.
"""

from __future__ import annotations

import itertools
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import loky

Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_PER_WORKER = 2
IDLE_SECONDS = 60
"""After which a process that got nothing to do leaves, also when the caller was killed."""


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int | None = None
) -> Iterator[Result]:
    """`function(item)` for each item; the function and the items must be picklable."""
    items = iter(items)
    first = list(itertools.islice(items, 2))
    items = itertools.chain(first, items)
    num_workers = num_workers or loky.cpu_count()
    if len(first) < 2 or num_workers < 2:
        yield from map(function, items)
        return
    executor = loky.ProcessPoolExecutor(num_workers, timeout=IDLE_SECONDS, initializer=_leave_signals)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > ITEMS_PER_WORKER * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, kill_workers=True)


def _leave_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
