"""`python -m tinyllama.bench`: our training step beside PyTorch's, interleaved in one run.

Each contender runs in a process of its own, so that its peak memory is measured alone, and
exchanges JSON lines:

    __main__.py          the command line
    text.py              real text -> the batches both contenders train on
    runner.py            starts the workers, runs their steps in turn (A B A B), takes medians
    protocol.py          messages between runner and workers (needs numpy only)
    worker_tinyllama.py  our trainer's own step          worker_torch.py, peer_*.py  PyTorch's
    ops.py               each operation alone, in GFLOPS (operations.py, operations_torch.py)
    machine.py           names the machine               report.py  the tables
"""
