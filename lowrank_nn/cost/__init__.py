"""Parameters, multiply-accumulates, bytes and latency."""
