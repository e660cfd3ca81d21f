"""TensorRT plans, run through CUDA's own bindings."""
