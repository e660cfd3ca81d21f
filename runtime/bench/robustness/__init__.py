"""Robustness: what is left of accuracy and of halting's promise on corrupted images."""
