"""What the toolkit asks of the operating system: files, locks, streams, memory, signals."""
