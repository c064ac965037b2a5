"""The compiled kernels counted without a GPU: `make roofline`."""
