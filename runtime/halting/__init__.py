"""When a sample may stop: choosing the threshold, and keeping it in an artifact."""
