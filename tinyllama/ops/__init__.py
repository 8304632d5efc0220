"""The operations of the model, one file each: formula, forms, gradient.

Each operation has one signature and two forms: portable (plain tinygrad tensors, which every
device runs) and a CPU kernel written in C (`ops/cpu/*.c`). `ops/forms.py` picks one of them.
"""
