"""What an artifact is packed for: a Hugging Face folder, a Triton model repository."""
