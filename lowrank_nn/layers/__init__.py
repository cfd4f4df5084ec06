"""Compressed layers: one file per format."""
