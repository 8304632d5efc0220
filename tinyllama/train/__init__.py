"""Training: from a configuration to checkpoints."""
