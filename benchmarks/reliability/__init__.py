"""Faults that a run must survive, provoked and counted."""
