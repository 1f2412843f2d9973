"""Complete, verified training states on disk: what a run carries on from. See `store`."""

from cvm_translator.checkpoints.folder import (
    DiskFullError,
    LoadedCheckpoint,
    Manifest,
    load_checkpoint,
    verify_checkpoint,
)
from cvm_translator.checkpoints.store import CheckpointStore, SavedCheckpoint, checkpoint_name

__all__ = [
    "CheckpointStore",
    "DiskFullError",
    "LoadedCheckpoint",
    "Manifest",
    "SavedCheckpoint",
    "checkpoint_name",
    "load_checkpoint",
    "verify_checkpoint",
]
