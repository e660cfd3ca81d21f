"""The recursion in ONNX: fragments traced once, layouts assembled from them."""
