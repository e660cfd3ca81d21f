"""`vitrm-bench`: latency, accuracy and agreement of artifacts, beside the eager model and beside other tools."""
