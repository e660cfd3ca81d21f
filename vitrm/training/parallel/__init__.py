"""Devices of a run: a GPU, the cores of a CPU, several processes."""
