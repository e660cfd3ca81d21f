"""Runs a model on images and writes down what reduced precision needs to know."""
