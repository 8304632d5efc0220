"""Text files to packed, masked, resumable batches of tokens."""
