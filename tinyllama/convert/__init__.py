"""Models from models: merging adapters."""
