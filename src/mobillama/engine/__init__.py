"""Engines: decoding a model token by token behind one small interface."""
