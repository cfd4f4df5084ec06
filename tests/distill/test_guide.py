"""The snippets of docs/distillation.md run."""

import re
from pathlib import Path

import torch


def test_snippets_run_in_order():
    text = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 3
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for snippet in snippets:
            exec(snippet, names)
    assert torch.isfinite(names["loss"])
    assert not any(module._forward_hooks for module in names["student"].modules())
