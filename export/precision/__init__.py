"""Fragments at another precision: float16, int8, and what that costs."""
