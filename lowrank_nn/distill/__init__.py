"""Knowledge distillation losses and feature taps."""
