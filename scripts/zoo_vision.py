"""The zoo's models of images and videos: classes, boxes, masks, depth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from zoo_doors import (
    DYNAMO,
    KERAS,
    LEGACY,
    MODULE,
    PT2,
    SAVED_MODEL,
    TFLITE,
    Family,
    TorchModel,
    huggingface,
    keras_door,
    torch_door,
    torchvision,
)
from zoo_networks import images, unet, yolo

HIDDEN, LAYERS, HEADS, INNER, SIZE, PATCH = 64, 2, 4, 128, 32, 8
VIT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "image_size": SIZE,
    "patch_size": PATCH,
}
WINDOWS = {
    "image_size": 64,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]}


def transformer(config: str, head: str, /, **options: Any) -> Any:
    """A model of transformers with random weights."""
    import transformers

    return getattr(transformers, head)(getattr(transformers, config)(**options))


HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTForImageClassification", VIT),
    "deit": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", VIT),
    "beit": ("BeitConfig", "BeitForImageClassification", VIT),
    "data2vec-vision": (
        "Data2VecVisionConfig",
        "Data2VecVisionModel",
        {**VIT, "use_relative_position_bias": True},
    ),
    "dinov2": ("Dinov2Config", "Dinov2Model", {**VIT, "mlp_ratio": 2}),
    "clip-vision": ("CLIPVisionConfig", "CLIPVisionModel", VIT),
    "siglip-vision": ("SiglipVisionConfig", "SiglipVisionModel", VIT),
    "yolos": ("YolosConfig", "YolosForObjectDetection", {**VIT, "image_size": [32, 48]}),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {
            "image_size": 64,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "swinv2": (
        "Swinv2Config",
        "Swinv2ForImageClassification",
        {
            "image_size": 64,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "convnext": ("ConvNextConfig", "ConvNextForImageClassification", {**STAGES, "image_size": 64}),
    "convnextv2": (
        "ConvNextV2Config",
        "ConvNextV2ForImageClassification",
        {**STAGES, "image_size": 64},
    ),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {**STAGES, "embedding_size": 16},
    ),
    "regnet": (
        "RegNetConfig",
        "RegNetForImageClassification",
        {**STAGES, "embedding_size": 16, "groups_width": 8},
    ),
    "mobilenet-v1": (
        "MobileNetV1Config",
        "MobileNetV1ForImageClassification",
        {"depth_multiplier": 0.25, "image_size": 64},
    ),
    "mobilenet-v2": (
        "MobileNetV2Config",
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.35, "image_size": 64},
    ),
    "mobilevit": (
        "MobileViTConfig",
        "MobileViTForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 16, 16, 16, 24, 32, 64],
        },
    ),
    "levit": (
        "LevitConfig",
        "LevitForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
    ),
    "segformer": (
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        {
            "image_size": 64,
            "hidden_sizes": [16, 16, 32, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 32,
        },
    ),
    "pvt": (
        "PvtConfig",
        "PvtForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 16, 32, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
        },
    ),
    "poolformer": (
        "PoolFormerConfig",
        "PoolFormerForImageClassification",
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "image_size": 64},
    ),
    "efficientnet": (
        "EfficientNetConfig",
        "EfficientNetForImageClassification",
        {
            "image_size": 64,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.25,
            "hidden_dim": 320,
        },
    ),
    "dpt": (
        "DPTConfig",
        "DPTForDepthEstimation",
        {
            **VIT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 16, 16, 16],
            "fusion_hidden_size": 16,
            "is_hybrid": False,
        },
    ),
    "focalnet": (
        "FocalNetConfig",
        "FocalNetForImageClassification",
        {
            "image_size": 64,
            "embed_dim": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
    ),
}


def detr() -> TorchModel:
    """DETR with a small ResNet."""
    import torch
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(**STAGES, embedding_size=16, out_features=["stage4"])
    config = DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=10,
    )
    model = DetrForObjectDetection(config)

    class Boxes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            found = self.model(pixel_values)
            return found.logits, found.pred_boxes

    return images(Boxes(), 96)


def of_torchvision(path: str, size: int = 64, **options: Any) -> TorchModel:
    models = torchvision().models
    for part in path.split(".")[:-1]:
        models = getattr(models, part)
    return images(getattr(models, path.rpartition(".")[2])(**options), size)


def of_timm(name: str, size: int = 64, **options: Any) -> TorchModel:
    torchvision()
    import timm

    return images(timm.create_model(name, pretrained=False, num_classes=10, **options), size)


def mixer(block: str) -> TorchModel:
    """Perceptrons over patches and channels, in three ways."""
    torchvision()
    from timm.models import mlp_mixer

    layers: dict[str, Any] = {
        "mixer": {},
        "resmlp": {
            "mlp_ratio": 4,
            "block_layer": mlp_mixer.ResBlock,
            "norm_layer": mlp_mixer.Affine,
        },
        "gmlp": {
            "mlp_ratio": 4,
            "block_layer": mlp_mixer.SpatialGatingBlock,
            "mlp_layer": mlp_mixer.GatedMlp,
        },
    }
    sizes = {"img_size": 64, "patch_size": 16, "num_blocks": 2, "embed_dim": 64, "num_classes": 5}
    return images(mlp_mixer.MlpMixer(**sizes, **layers[block]), 64)


def dense_torchvision(name: str, size: int = 64, **options: Any) -> TorchModel:
    """Segmentation, without the dictionary that it returns."""
    import torch

    models = torchvision().models.segmentation
    model = getattr(models, name)(weights=None, weights_backbone=None, num_classes=5, **options)

    class Masks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            return self.model(pixel_values)["out"]

    return images(Masks(), size)


def video(name: str, frames: int = 8, size: int = 32) -> TorchModel:
    import torch

    model = getattr(torchvision().models.video, name)(weights=None, num_classes=10)
    x = torch.randn(1, 3, frames, size, size)
    return TorchModel(model, (x,), ["frames"], {})


def keras_application(name: str, size: int = 64, **options: Any) -> Any:
    import keras

    shape = (size, size, 3)
    return getattr(keras.applications, name)(weights=None, input_shape=shape, classes=10, **options)


BUILT: tuple[tuple[str, str, Callable[[], TorchModel]], ...] = (
    ("mlp-mixer", LEGACY, partial(mixer, "mixer")),
    ("resmlp", DYNAMO, partial(mixer, "resmlp")),
    ("gmlp", LEGACY, partial(mixer, "gmlp")),
    ("resnet18", LEGACY, partial(of_torchvision, "resnet18")),
    ("squeezenet", DYNAMO, partial(of_torchvision, "squeezenet1_1")),
    ("shufflenet-v2", LEGACY, partial(of_torchvision, "shufflenet_v2_x0_5")),
    ("mobilenet-v3", DYNAMO, partial(of_torchvision, "mobilenet_v3_small")),
    ("mnasnet", PT2, partial(of_torchvision, "mnasnet0_5")),
    ("googlenet", LEGACY, partial(of_torchvision, "googlenet", aux_logits=False)),
    ("densenet", DYNAMO, partial(of_torchvision, "densenet.DenseNet", **{
        "growth_rate": 8, "block_config": (2, 2, 2), "num_init_features": 16})),
    ("maxvit", MODULE, partial(of_torchvision, "maxvit.MaxVit", **{
        "input_size": (64, 64), "stem_channels": 16, "partition_size": 4,
        "block_channels": [16, 32], "block_layers": [1, 1], "head_dim": 8,
        "stochastic_depth_prob": 0.0})),
)  # fmt: skip

TIMM: tuple[tuple[str, str, str, int, dict[str, Any]], ...] = (
    ("coat", LEGACY, "coat_lite_tiny", 64, {"img_size": 64}),
    ("cait", DYNAMO, "cait_xxs24_224", 64, {"img_size": 64, "embed_dim": 64, "depth": 2}),
    ("xcit", DYNAMO, "xcit_nano_12_p16_224", 64, {"img_size": 64, "depth": 2}),
    ("repvgg", LEGACY, "repvgg_a0", 64, {}),
    ("ghostnet", DYNAMO, "ghostnet_050", 64, {}),
    ("hrnet", LEGACY, "hrnet_w18_small", 64, {}),
    ("res2net", LEGACY, "res2net50_26w_4s", 64, {"layers": (1, 1, 1, 1)}),
    ("nfnet", DYNAMO, "nf_resnet26", 64, {}),
    ("edgenext", DYNAMO, "edgenext_xx_small", 64, {}),
    ("fastvit", LEGACY, "fastvit_t8", 64, {}),
    ("efficientvit", DYNAMO, "efficientvit_b0", 64, {}),
    ("convit", LEGACY, "convit_tiny", 64, {"img_size": 64, "depth": 2, "local_up_to_layer": 1}),
    ("eva02", DYNAMO, "eva02_tiny_patch14_224", 56, {"img_size": 56, "depth": 2}),
    ("twins", LEGACY, "twins_svt_small", 64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    ("pit", DYNAMO, "pit_ti_224", 64, {"img_size": 64, "depth": (1, 1, 1)}),
    ("dla", LEGACY, "dla46x_c", 64, {}),
)  # fmt: skip

FAMILIES: list[Family] = [
    *(
        Family(name, "vision", "Hugging Face", huggingface(partial(transformer, c, h, **o)))
        for name, (c, h, o) in HUGGING_FACE.items()
    ),
    Family("detr", "detection", DYNAMO, torch_door(DYNAMO, detr)),
    Family("yolo", "detection", LEGACY, torch_door(LEGACY, yolo)),
    Family("unet", "segmentation", LEGACY, torch_door(LEGACY, unet)),
    Family(
        "lraspp",
        "segmentation",
        LEGACY,
        torch_door(LEGACY, partial(dense_torchvision, "lraspp_mobilenet_v3_large")),
    ),
    Family("r3d", "video", LEGACY, torch_door(LEGACY, partial(video, "r3d_18"))),
    *(Family(name, "vision", door, torch_door(door, make)) for name, door, make in BUILT),
    *(
        Family(name, "vision", door, torch_door(door, partial(of_timm, model, size, **options)))
        for name, door, model, size, options in TIMM
    ),
    *(
        Family(name, "vision", door, keras_door(door, partial(keras_application, model, **options)))
        for name, door, model, options in (
            ("keras-mobilenet-v2", KERAS, "MobileNetV2", {"alpha": 0.35}),
            ("keras-mobilenet-v3", TFLITE, "MobileNetV3Small", {"minimalistic": False}),
            ("keras-mobilenet", SAVED_MODEL, "MobileNet", {"alpha": 0.25}),
            ("keras-efficientnet-b0", KERAS, "EfficientNetB0", {}),
        )
    ),
]
