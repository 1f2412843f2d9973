"""Runs in the background: start, stop, resume, and the supervisor that keeps them going. Never imports torch."""

from cvm_translator.daemon.background import NotRunningError, StartError, resume, start, stop, supervise

__all__ = ["NotRunningError", "StartError", "resume", "start", "stop", "supervise"]
