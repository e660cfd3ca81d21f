"""ONNX Runtime: unrolled, loop and stepwise files, on a CPU or a GPU."""
