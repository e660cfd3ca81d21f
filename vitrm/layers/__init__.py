"""Layers that more than one model has."""
