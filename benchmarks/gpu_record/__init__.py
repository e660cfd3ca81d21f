"""The GPU record: engines, the worker that measures one of them, and the rows that are planned."""
