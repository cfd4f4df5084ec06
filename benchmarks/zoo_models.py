"""The architectures of the zoo benchmark: with random weights, in eval mode, and what each is called with."""

from __future__ import annotations

from typing import Any

import torch
import zoo_transformers
from torch import Tensor, nn
from zoo_detection import detector

TIMM = """vit_tiny_patch16_224 repvgg_a0 botnet26t_256 poolformer_s12 cait_xxs24_224 coat_lite_tiny coatnet_nano_rw_224
    convit_tiny convmixer_768_32 convnext_atto crossvit_tiny_240 cs3darknet_focus_s davit_tiny deit_tiny_patch16_224
    densenet121 dla34 dpn48b ese_vovnet19b_slim resnet10t edgenext_xx_small efficientformer_l1 efficientformerv2_s0
    efficientnet_lite0 efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8 mobilenetv3_small_050 focalnet_tiny_srf
    gcvit_xxtiny ghostnet_050 mixer_s32_224 gmlp_ti16_224 hardcorenas_a hgnetv2_b0 hiera_tiny_224 hrnet_w18_small
    inception_next_atto inception_v4 legacy_seresnet18 levit_128s mambaout_femto mobilevit_xxs mvitv2_tiny nest_tiny
    nf_regnet_b0 pit_ti_224 pvt_v2_b0 regnetx_002 repghostnet_050 repvit_m0_9 res2net50_14w_8s resnest14d resnetv2_18
    rexnet_100 selecsls42b skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 tiny_vit_5m_224
    tnt_s_patch16_224 twins_svt_small visformer_tiny xcit_nano_12_p16_224 xception41"""
SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit": 64, "vit_h_14": 56, "alexnet": 96}


def names() -> list[str]:
    """Return all names, those of timm and transformers behind the library's."""
    from torchvision import models

    modules = (models, models.segmentation, models.detection)
    return [
        *(name for module in modules for name in models.list_models(module=module)),
        *(f"timm/{name}" for name in TIMM.split()),
        *(f"transformers/{name}" for name in zoo_transformers.names()),
    ]


def build(name: str) -> tuple[nn.Module, Any]:
    """Return a model and what it is called with."""
    torch.manual_seed(0)
    model, inputs = initialised(name)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # outputs that are zero would agree whatever happens
    return model.eval(), inputs


def initialised(name: str) -> tuple[nn.Module, Any]:
    """Return a model with the weights that its library draws, and what it is called with."""
    if name.startswith("timm/"):
        return timm_model(name.removeprefix("timm/"))
    if name.startswith("transformers/"):
        return zoo_transformers.transformers_model(name.removeprefix("transformers/"))
    from torchvision import models

    if name in models.list_models(module=models.detection):
        return detector(name)
    return torchvision_model(name)


def timm_model(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model of timm, and images for it."""
    import timm

    model = timm.create_model(name)
    settings = model.pretrained_cfg
    size = settings["input_size"][-1] if settings.get("fixed_input_size") else 96
    return model, torch.randn(2, 3, size, size)


def torchvision_model(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model of torchvision that classifies or segments, and images for it."""
    from torchvision import models

    size = SIZES.get(name, SIZES.get(name.split("_")[0], 64))
    options: dict[str, Any] = {"weights": None}
    if name.startswith("vit"):
        options["image_size"] = size
    if name in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return models.get_model(name, **options), torch.randn(2, 3, size, size)
