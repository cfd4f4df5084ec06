"""One file per compressed model, without pickle."""
