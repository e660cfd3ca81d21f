"""Damaged and hostile files of every kind the product reads: `formats` says which, the others how they are damaged."""
