"""The commands that run, steer and watch a run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cvm_translator.cli.tell import tell
from cvm_translator.errors import EXIT_OK
from cvm_translator.runs.text import printable

if TYPE_CHECKING:
    from cvm_translator.config import RunConfig

Options = argparse.Namespace


def run(options: Options) -> int:
    from cvm_translator.config import load_config

    return _run_pipeline(load_config(options.config, options.set, options.output_dir), options)


def _run_pipeline(config: RunConfig, options: Options) -> int:
    from cvm_translator.pipeline.cards import describe_verdict
    from cvm_translator.pipeline.distiller import run_pipeline
    from cvm_translator.runs.heartbeat import Heartbeat

    report = run_pipeline(config, progress=not options.no_progress, heartbeat=Heartbeat.from_environment())
    if options.no_progress:
        print(describe_verdict(report))
    exit_code: int = report["exit_code"]
    return exit_code


def start(options: Options) -> int:
    from cvm_translator.daemon import start, supervise

    if options.foreground:
        return supervise(options.config, options.set, options.output_dir, progress=not options.no_progress)
    _announce(*start(options.config, options.set, options.output_dir))
    return EXIT_OK


def _announce(run_dir: Path, pid: int) -> None:
    print(f"run folder: {run_dir}\nprocess id: {pid}")
    tell(f"it runs in the background; look at it with: cvm-translator monitor {run_dir}")


def stop(options: Options) -> int:
    from cvm_translator.daemon import stop

    print(f"process {stop(options.run_dir, options.timeout)} has saved and left {options.run_dir}")
    return EXIT_OK


def control(options: Options) -> int:
    from cvm_translator.daemon.requests import ask

    print(printable(ask(options.run_dir, options.action, options.timeout)))
    return EXIT_OK


def service_unit(options: Options) -> int:
    from cvm_translator.daemon.unit import write_unit

    print(write_unit(options.config, options.set, options.output_dir), end="")
    return EXIT_OK


def resume(options: Options) -> int:
    from cvm_translator.config import load_config
    from cvm_translator.daemon import resume
    from cvm_translator.daemon.background import require_run_folder
    from cvm_translator.runs.layout import RunLayout

    if options.foreground:
        require_run_folder(options.run_dir)
        return _run_pipeline(load_config(RunLayout(options.run_dir).config, [], options.run_dir), options)
    _announce(*resume(options.run_dir))
    return EXIT_OK


# ------------------------------------------------------------------------------------------------------------ watching


def status(options: Options) -> int:
    from cvm_translator.observe.status import show_status

    return show_status(options.run_dir, as_json=options.json)


def monitor(options: Options) -> int:
    from cvm_translator.observe.monitor import main as monitor
    from cvm_translator.observe.targets import TargetOptions

    if not options.once:
        os.nice(5)  # a run on a busy machine goes first
    return monitor(
        options.run_dir,
        once=options.once,
        as_json=options.json,
        report_every_seconds=options.report_every,
        refresh_seconds=options.refresh,
        targets=TargetOptions(options.webhook_url_env, options.webhook_url_file, options.alert_command),
        metrics_port=options.metrics_port,
        metrics_host=options.metrics_host,
    )
