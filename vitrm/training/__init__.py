"""How a model learns: from a recipe and images to a run folder."""
