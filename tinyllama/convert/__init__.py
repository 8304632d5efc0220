"""Models from models: merging adapters, and exports for other programs."""
