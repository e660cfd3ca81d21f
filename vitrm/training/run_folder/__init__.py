"""A run folder: who may train into it, and the files that training writes."""
