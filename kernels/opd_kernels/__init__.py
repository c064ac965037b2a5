# Where the Triton kernels will live: device code and launchers only, no autograd, no defaults, no policy.
#
#   One fused sweep per position over both models' logits gives the columns of opd_ops/stats.py::TokenStats.
#
# Not here yet: any kernel. Until they arrive every call runs on opd_ops/backends/streamed.py, on any device.
