"""Whether a model and the process are as they were."""

import random
import warnings

import numpy as np
import torch

from tests.storage.models import bits_of


def snapshot(model):
    """All that a user could see of a model and of the process."""
    return {
        "state": {key: (value.dtype, value.shape, bits_of(value)) for key, value in model.state_dict().items()},
        "identity": [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()],
        "buffers": [(name, id(b), bits_of(b)) for name, b in model.named_buffers()],
        "modules": [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else bits_of(p.grad) for p in model.parameters()],
        "python random": random.getstate(),
        "numpy random": str(np.random.get_state()),  # noqa: NPY002
        "torch random": bits_of(torch.get_rng_state()),
        "filters": list(warnings.filters),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def assert_untouched(model, before):
    """All of it is as :func:`snapshot` saw it."""
    after = snapshot(model)
    for what, value in before.items():
        assert after[what] == value, what
