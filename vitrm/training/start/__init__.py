"""How a run starts: its identity and learner, weights taken over, the memory it will need."""
