"""`python -m tinyllama.bench`: our training step beside PyTorch's, interleaved in one run.

Each contender runs in a process of its own (so that peak memory is its own) and speaks JSON lines:

    __main__.py          the command line
    text.py              real text -> the batches both contenders train on
    runner.py            starts the workers, steps them A B A B, takes medians
    protocol.py          what runner and workers say to each other (needs numpy only)
    worker_tinyllama.py  our trainer's own step          worker_torch.py, peer_*.py  PyTorch's
    ops.py               each operation alone, in GFLOPS (operations.py, operations_torch.py)
    machine.py           names the machine               report.py  the tables
"""
