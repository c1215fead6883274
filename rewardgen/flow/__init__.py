"""The mathematics of flow matching: pure functions over tensors and velocity callables."""
