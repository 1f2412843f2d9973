"""Exports: one model folder in the formats of other people's runtimes, each verified there before it is in place."""

from __future__ import annotations

from cvm_translator.pipeline.export.exporter import FORMATS, ExportRequest, export_model

__all__ = ["FORMATS", "ExportRequest", "export_model"]
