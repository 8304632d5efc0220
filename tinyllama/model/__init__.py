"""The model: LLaMA, its layers, adapters, packed weights, first values, counts."""
