"""Results of a classifier by class, as data and in words."""
