"""The operating system: files, locks, streams, memory, signals."""
