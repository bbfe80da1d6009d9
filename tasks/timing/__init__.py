"""How kernels and decoding are timed, and on what."""
