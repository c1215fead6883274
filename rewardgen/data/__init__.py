"""Datasets: sequences of `Example`."""
