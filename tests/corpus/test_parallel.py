"""Work by several processes: in order, bounded, and its errors arrive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cvm_translator.corpus.parallel import ITEMS_PER_WORKER, map_in_order
from cvm_translator.errors import CorpusError


def tell(item: int) -> tuple[int, int]:
    if item == 7:
        raise CorpusError("item 7 cannot be read")
    return item, os.getpid()


def test_results_come_in_order_from_other_processes_and_few_items_wait() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100, 140):
            taken.append(item)
            yield item

    results = map_in_order(tell, items(), num_workers=2)
    assert next(results)[0] == 100 and len(taken) == 2 * ITEMS_PER_WORKER
    rest = list(results)
    assert [item for item, _ in rest] == list(range(101, 140))
    assert os.getpid() not in {process for _, process in rest}


def test_one_item_or_one_worker_starts_nothing() -> None:
    here = os.getpid()
    assert list(map_in_order(tell, [1], num_workers=2)) == [(1, here)]
    assert list(map_in_order(tell, [1, 2], num_workers=1)) == [(1, here), (2, here)]
    assert list(map_in_order(tell, [])) == []


def test_an_error_in_a_process_and_one_in_the_items_are_raised_here() -> None:
    with pytest.raises(CorpusError, match="item 7 cannot be read"):
        list(map_in_order(tell, range(20), num_workers=2))

    def broken() -> Iterator[int]:
        yield from range(5)
        raise CorpusError("line 6 is missing")

    with pytest.raises(CorpusError, match="line 6 is missing"):
        list(map_in_order(tell, broken(), num_workers=2))


def kill_myself(item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_told_with_the_remedy() -> None:
    with pytest.raises(CorpusError, match="killed, most likely for want of memory: make room"):
        list(map_in_order(kill_myself, range(4), num_workers=2))


def test_the_processes_of_a_killed_caller_vanish(tmp_path: Path) -> None:
    """Though they are in the middle of handing over results that fill the pipe."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "from functools import partial\n"
        "from cvm_translator.corpus.parallel import map_in_order\n"
        "for done in map_in_order(partial(pow, 3), range(1_000_000, 1_000_100), num_workers=2):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == str(process.pid)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        process.kill()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive and len(gone) == len(workers)


def test_a_script_without_a_guard_is_not_run_again(tmp_path: Path) -> None:
    """What a user's own script does at its top level happens once, not in every process."""
    script = tmp_path / "script.py"
    script.write_text(
        "import math\n"
        "from cvm_translator.corpus.parallel import map_in_order\n"
        "print('once', list(map_in_order(math.sqrt, [4, 9, 16], num_workers=2)))\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (result.stdout, result.stderr) == ("once [2.0, 3.0, 4.0]\n", "")
