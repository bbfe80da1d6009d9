"""The speed: kernels of the sparse gated FFN, slow and readable, native, and on the GPU.

Knows torch and numpy, nothing else of this repository.
"""
