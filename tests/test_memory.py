"""The command line keeps freed memory, unless the user has chosen otherwise."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from cvm_translator.cli.memory import keep_freed_memory

IS_GLIBC = platform.libc_ver()[0] == "glibc"

PROGRAM = """
import resource, sys
from cvm_translator.cli import main
if sys.argv[1] == "command":
    main(["status", "nothing-here"])
import numpy as np

def use():
    blocks = [np.ones(2_000_000) for _ in range(16)]  # 15 MiB each

use()
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    use()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 3)
"""


def count_page_faults(how: str) -> int:
    """Of using 244 MiB once more."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not IS_GLIBC, reason="glibc alone has these options")
def test_memory_is_used_again_without_asking_the_system() -> None:
    assert count_page_faults("command") < 0.01 * count_page_faults("plain")


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_user_s_choice_is_kept(name: str) -> None:
    assert not keep_freed_memory({name: "1"})
