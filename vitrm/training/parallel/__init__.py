"""Where a run computes: a device, the cores of a CPU, several processes."""
