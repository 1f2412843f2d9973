"""Settings: their schema, and how files and keyword arguments become one."""

from cvm_translator.config.load import DistillationConfig, dump_config, load_config
from cvm_translator.config.schema import RunConfig

__all__ = ["DistillationConfig", "RunConfig", "dump_config", "load_config"]
