"""Model → files for a device: fragments traced once, the recursion assembled in ONNX IR."""
