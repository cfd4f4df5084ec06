"""Decompositions as pure functions: tensors in, factors out."""
