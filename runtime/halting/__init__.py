"""Halting: choosing the threshold at which a sample may stop, and keeping it in an artifact."""
