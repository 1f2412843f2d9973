"""The command line shortens OpenMP's spinning, and leaves alone what the user has chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cvm_translator.cli.threads import SPIN_COUNT, shorten_spinning


def test_it_is_set_where_nothing_was_chosen() -> None:
    environment: dict[str, str] = {}
    shorten_spinning(environment)
    assert environment == {"GOMP_SPINCOUNT": str(SPIN_COUNT)}


@pytest.mark.parametrize("chosen", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_the_user_s_choice_is_kept(chosen: dict[str, str]) -> None:
    environment = dict(chosen)
    shorten_spinning(environment)
    assert environment == chosen


def test_it_is_set_before_torch_is_imported() -> None:
    program = (
        "import os, sys\n"
        "from cvm_translator.cli import main\n"
        "main(['status', 'nothing-here'])\n"
        "assert os.environ['GOMP_SPINCOUNT'] and 'torch' not in sys.modules\n"
    )
    plain = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", program], env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
