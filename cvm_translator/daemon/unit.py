"""A systemd unit for a run: what `cvm-translator service-unit` prints.

The supervisor speaks `Type=notify` itself. The settings that matter, and why:

- `KillMode=mixed`: SIGTERM goes to the supervisor alone, which passes it on; a trainer that got it twice would leave
  without saving.
- `Restart=on-abnormal`: the supervisor restarts the trainer; systemd restarts the supervisor only where that died of a
  signal or missed the watchdog. An error that the user must mend (exit code 1) or a failed gate (5) is final.
- `OOMPolicy=continue`: a trainer killed for memory is started again with smaller micro-batches; systemd would otherwise
  stop the unit.
- `SuccessExitStatus=130 143`: stopped after saving.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cvm_translator.daemon.background import find_run_dir, require_run_folder, supervisor_command
from cvm_translator.runs.layout import RunLayout

_PLAIN = re.compile(r"[A-Za-z0-9_./=:,+-]+\Z")

UNIT = """\
# Save as ~/.config/systemd/user/{name}.service, then:
#   systemctl --user daemon-reload && systemctl --user enable --now {name}
# (loginctl enable-linger lets it run without a login; for a system unit add User= and use multi-user.target)
[Unit]
Description=CVM Translator run in {run_dir}
StartLimitIntervalSec=1h
StartLimitBurst=5

[Service]
Type=notify
NotifyAccess=main
WorkingDirectory={working_directory}
ExecStart={command}
Restart=on-abnormal
RestartSec=30
SuccessExitStatus=130 143
WatchdogSec=180
KillMode=mixed
KillSignal=SIGTERM
TimeoutStartSec=900
TimeoutStopSec=180
OOMPolicy=continue

[Install]
WantedBy=default.target
"""


def write_unit(target: Path, overrides: Sequence[str], output_dir: Path | None) -> str:
    """The unit of a config, or of the run in a folder. Raises CvmError for a config that is wrong."""
    if target.is_dir():
        require_run_folder(target)
        target, output_dir = RunLayout(target).config, target
    run_dir = find_run_dir(target, overrides, output_dir)
    return UNIT.format(
        name=f"cvm-translator-{''.join(c if c.isalnum() else '-' for c in run_dir.name)}",
        run_dir=str(run_dir).replace("%", "%%"),
        working_directory=str(Path.cwd()).replace("%", "%%"),
        command=" ".join(quote(part) for part in supervisor_command(target.absolute(), overrides, run_dir)),
    )


def quote(word: str) -> str:
    """A word of ExecStart, with what systemd would expand, cut or unescape written literally."""
    if _PLAIN.match(word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'
