"""What an artifact says of itself, and whether to believe it."""
