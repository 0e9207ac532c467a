"""Tensors in, tensors out: attention over pages, linear layers, sampling. Nothing here knows of requests or files."""
