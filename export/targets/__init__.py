"""The forms that an artifact is packed in: a Hugging Face folder, a Triton model repository."""
