"""Shared by all tests: one thread, so that small tensors are quick and results repeat; Ctrl-C is not ignored."""

import signal

import torch

torch.set_num_threads(1)
# A shell starts what it runs in the background with Ctrl-C ignored, and every process of the tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
