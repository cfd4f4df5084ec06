"""A sequence classifier on torch's own encoder (Vaswani et al. 2017): attention internals and fused kernels."""

from torch import Tensor, nn


class TransformerClassifier(nn.Module):
    def __init__(self, vocabulary: int = 50, dim: int = 32, heads: int = 4, depth: int = 2, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim, padding_idx=0)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=True)
        self.head = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor, mask_padding: bool = False) -> Tensor:
        """Classify ``tokens``, shape ``(N, L)``; ``mask_padding`` hides the zeros at their ends."""
        padding = tokens.eq(0) if mask_padding else None
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=padding)[:, 0])
