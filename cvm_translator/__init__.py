"""CVM Translator: distil large translation models into small, quantised ones under a quality guard."""

__version__ = "0.1.0"
