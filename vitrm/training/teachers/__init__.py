"""Models that a student learns from: runs of this project, and networks of torchvision."""
