"""The version, for pyproject.toml and for `tinyllama --version`."""

__version__ = "0.1.0"
