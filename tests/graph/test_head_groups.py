"""Channel groups of attention: whole heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.graph import find_groups
from tests.graph.test_groups import checked, free


class Attention(nn.Module):
    """Self-attention in one of many spellings; ``kv_heads`` below ``heads`` share keys and values."""

    def __init__(self, dim, heads, kv_heads, width, fused):
        super().__init__()
        self.heads, self.kv_heads, self.width, self.fused = heads, kv_heads, width, fused
        self.query = nn.Linear(dim, heads * width)
        self.key, self.value = nn.Linear(dim, kv_heads * width), nn.Linear(dim, kv_heads * width)
        self.table = nn.Parameter(torch.randn(9, heads))
        self.register_buffer("index", torch.arange(16).view(4, 4) % 9)
        self.proj = nn.Linear(heads * width, dim)

    def forward(self, x):
        split = [
            layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        ]
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)[None]
        if self.fused == "gqa":
            out = F.scaled_dot_product_attention(*split, attn_mask=bias, enable_gqa=True)
        else:
            q, k, v = split
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
            out = ((q @ k.mT) * self.width**-0.5 + bias).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("kv_heads", "fused"), [(6, "no"), (6, "gqa"), (3, "no"), (3, "gqa")])
def test_whole_heads_are_removed_with_their_share_of_a_bias_table(kv_heads, fused):
    model = nn.Sequential(nn.Linear(5, 8), Attention(8, 6, kv_heads, 4, fused), nn.Linear(8, 3))
    groups = checked(model, torch.randn(2, 4, 5, dtype=torch.float64))
    assert free(groups) == {"0": 8, "1.query": kv_heads, "1.proj": 8}
    (heads,) = (group for group in groups if group.name == "1.query")
    share = 6 // kv_heads
    counts = {member.name: len(member.positions[0]) for member in heads.members}
    assert counts == {
        "1.query.weight": 4 * share, "1.query.bias": 4 * share, "1.key.weight": 4, "1.key.bias": 4,
        "1.value.weight": 4, "1.value.bias": 4, "1.table": share, "1.proj.weight": 4 * share,
    }  # fmt: skip


@pytest.mark.parametrize("weights", [True, False])
def test_heads_of_torchs_attention(weights):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, 8)
            self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x, hidden):
            x = self.embed(x)
            return self.head(self.attention(x, x, x, key_padding_mask=hidden, need_weights=weights)[0])

    hidden = torch.tensor([[False, False, False, True], [False, False, True, True]])
    groups = find_groups(Net(), (torch.randn(2, 4, 5), hidden))
    heads = next(group for group in groups if group.name == "attention.in_proj_weight")
    assert not heads.frozen
    assert [(m.name, m.dim, m.role, m.positions[1]) for m in heads.members] == [
        ("attention.in_proj_weight", 0, "out", (2, 3, 10, 11, 18, 19)),
        ("attention.in_proj_bias", 0, "out", (2, 3, 10, 11, 18, 19)),
        ("attention.out_proj.weight", 1, "in", (2, 3)),
    ]
