"""Steps, recipes, plan() and compress_model()."""
