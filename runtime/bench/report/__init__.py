"""Presentation of a result: a page, its charts, a table on the terminal."""
