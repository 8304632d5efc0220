"""The machine, and nothing of tensors: device, processor, memory, files, signals, processes."""
