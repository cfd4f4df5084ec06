"""Candidates per layer, their errors, and their allocation under a budget."""
