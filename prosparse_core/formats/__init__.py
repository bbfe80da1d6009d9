"""The file formats that a variant is exported to, and GGUF, which models come in."""
