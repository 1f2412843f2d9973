"""Runs in the background: start, stop, resume. Never imports torch. See `background`."""

from cvm_translator.daemon.background import NotRunningError, StartError, resume, start, stop

__all__ = ["NotRunningError", "StartError", "resume", "start", "stop"]
