"""Training: from a recipe and images to a run folder."""
