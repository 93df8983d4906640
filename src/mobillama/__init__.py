"""MobiLlama: accurate and lightweight, fully transparent small language models.

Importing this package is light: it loads neither torch nor transformers. ``import mobillama.hf`` registers the
transformers classes.
"""

__version__ = "0.1.0"
