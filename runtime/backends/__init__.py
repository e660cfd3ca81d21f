"""The engines that run an artifact, one module or package each."""
