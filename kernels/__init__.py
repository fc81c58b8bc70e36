"""Triton kernels of the package, installed as ``topk_ortho.kernels``.

A kernel takes tensors and writes tensors; it knows nothing of backends, losses or policy. Each kernel is one file that
opens with its equation, shapes and dtypes, and ends with the launcher that a backend calls.
"""
