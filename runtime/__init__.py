"""Opens any artefact and runs, measures and compares it.  Needs numpy and a backend, never torch."""
