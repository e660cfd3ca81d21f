"""The machine: its processor, its GPUs, what it draws."""
