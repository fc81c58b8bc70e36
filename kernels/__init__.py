"""Triton kernels of the package, imported as ``topk_ortho.kernels``.

A kernel takes tensors and writes tensors; it knows nothing of backends, losses or policy. Each file of a kernel opens
with its equation, shapes and dtypes, and ends with the launcher that a backend calls. `tiles` is device code that the
kernels over gram tiles share, `launch` says how they are launched on which architecture, and `radix_select` how the
kernels of one call decide on the device whose turn it is.
"""
