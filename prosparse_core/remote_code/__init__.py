"""Files that travel inside an exported Hugging Face folder; they know torch and transformers, nothing of ours.

``configuration_prosparse.py`` and ``modeling_prosparse.py`` are written for Llama; an export puts the classes of the
model's own architecture, and where its layers and activations are, in Llama's place (see prosparse_core/export.py). The
product imports none of them.
"""
