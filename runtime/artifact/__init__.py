"""Metadata of artifacts: read, checked, and compared with the file it belongs to."""
