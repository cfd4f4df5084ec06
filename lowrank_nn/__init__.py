"""Drop-in compressed PyTorch layers, and one call that compresses a trained network with them."""

__version__ = "0.1.0"
