"""Shared by all tests: one thread, so that small tensors are quick and results repeat."""

import torch

torch.set_num_threads(1)
