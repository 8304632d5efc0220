"""Weights of other programs, in and out: one file a format, and nothing here knows the model."""
