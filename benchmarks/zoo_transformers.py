"""Models of Hugging Face's transformers for the zoo benchmark: the code is theirs, the sizes are small."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Config = dict[str, Any]

TEXT: Config = {"vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = TEXT | {"num_key_value_heads": 2}
WITH_HEAD_DIM = GROUPED | {"head_dim": 12}
PATCHES: Config = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
PATCHES |= {"image_size": 32, "patch_size": 8}
TWO_STAGES: Config = {"hidden_sizes": [16, 32], "depths": [1, 1]}
SEQUENCES: Config = {
    "vocab_size": 100,
    "d_model": 48,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
WINDOWS: Config = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}

LIKE_BERT = """bert roberta electra deberta deberta-v2 xlm-roberta mpnet camembert roformer nystromformer ernie
    mobilebert convbert fnet"""
LIKE_LLAMA = "llama mistral qwen2 phi3 olmo olmo2 cohere granite starcoder2 mixtral"
LIKE_GEMMA = "gemma gemma2 qwen3"
LIKE_NEOX = "gpt_neox phi persimmon"
LIKE_VIT = "vit dinov2 beit vit_msn ijepa"

ENCODERS: dict[str, Config] = dict.fromkeys(LIKE_BERT.split(), TEXT) | {
    "albert": TEXT | {"embedding_size": 24},
    "distilbert": {"vocab_size": 100, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
}
DECODERS: dict[str, Config] = (
    dict.fromkeys(LIKE_NEOX.split(), TEXT)
    | dict.fromkeys(LIKE_LLAMA.split(), GROUPED)
    | dict.fromkeys(LIKE_GEMMA.split(), WITH_HEAD_DIM)
    | {
        "gpt2": {"vocab_size": 100, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "opt": TEXT | {"ffn_dim": 96, "word_embed_proj_dim": 48},
        "bloom": {"vocab_size": 100, "hidden_size": 48, "n_layer": 2, "n_head": 4},
        "falcon": TEXT,
        "mamba": {"vocab_size": 100, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
        "rwkv": {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 32},
    }
)
IMAGES: dict[str, Config] = dict.fromkeys(LIKE_VIT.split(), PATCHES) | {
    "swin": WINDOWS | {"window_size": 4},
    "swinv2": WINDOWS | {"window_size": 4},
    "focalnet": WINDOWS | TWO_STAGES,
    "convnext": TWO_STAGES | {"num_stages": 2},
    "convnextv2": TWO_STAGES | {"num_stages": 2},
    "resnet": TWO_STAGES | {"embedding_size": 16, "layer_type": "basic"},
    "regnet": TWO_STAGES | {"embedding_size": 16, "groups_width": 8},
    "segformer": TWO_STAGES
    | {"num_encoder_blocks": 2, "num_attention_heads": [2, 4], "sr_ratios": [2, 1]}
    | {"patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]},
    "poolformer": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "pvt": {"image_size": 32, "hidden_sizes": [16, 32, 40, 48], "depths": [1, 1, 1, 1]}
    | {"num_attention_heads": [1, 2, 4, 4]},
    "mobilenet_v2": {},
}
SEQUENCE_TO_SEQUENCE: dict[str, Config] = {
    "t5": SEQUENCES | {"d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    "bart": SEQUENCES
    | {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    | {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64},
}
KINDS = {
    "SequenceClassification": ENCODERS,
    "CausalLM": DECODERS,
    "ImageClassification": IMAGES,
    "Seq2SeqLM": SEQUENCE_TO_SEQUENCE,
}


def names() -> list[str]:
    """Return the names of all architectures."""
    return [name for configs in KINDS.values() for name in configs]


def transformers_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with the weights that its library draws, and the keywords that it is called with."""
    import transformers

    kind = next(kind for kind, configs in KINDS.items() if name in configs)
    config = transformers.AutoConfig.for_model(name, **KINDS[kind][name])
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    if kind == "ImageClassification":
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}
    tokens = torch.randint(5, 95, (2, 12))
    # Keys and values that are returned for the next token would protect all heads.
    return model, {"input_ids": tokens} | {
        "SequenceClassification": {},
        "CausalLM": {"use_cache": False},
        "Seq2SeqLM": {"use_cache": False, "decoder_input_ids": tokens[:, :7]},
    }[kind]
