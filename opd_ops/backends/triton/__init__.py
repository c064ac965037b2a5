"""The Triton backend: GPUs."""
