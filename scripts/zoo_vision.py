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


def images(module: Any, size: int, channels: int = 3, symbolic: bool = True) -> TorchModel:
    """A module of one batch of images."""
    import torch

    axes = {"pixel_values": {0: "batch"}} if symbolic else {}
    x = torch.randn(2, channels, size, size)
    return TorchModel(module, (x,), ["pixel_values"], axes)


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


def dense_torchvision(name: str, **options: Any) -> TorchModel:
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

    return images(Masks(), 64)


def video(name: str) -> TorchModel:
    import torch

    model = getattr(torchvision().models.video, name)(weights=None, num_classes=10)
    x = torch.randn(1, 3, 8, 32, 32)
    return TorchModel(model, (x,), ["frames"], {})


def unet() -> TorchModel:
    """U-Net with transposed convolutions, over images of any size that divides by four."""
    import torch
    from torch import nn

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.ReLU(),
        )

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList([block(3, 16), block(16, 32), block(32, 64)])
            self.rise = nn.ModuleList(
                [nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)]
            )
            self.up = nn.ModuleList([block(64, 32), block(32, 16)])
            self.scores = nn.Conv2d(16, 2, 1)

        def forward(self, x: Any) -> Any:
            first = self.down[0](x)
            second = self.down[1](torch.max_pool2d(first, 2))
            x = self.down[2](torch.max_pool2d(second, 2))
            x = self.up[0](torch.cat([self.rise[0](x), second], 1))
            x = self.up[1](torch.cat([self.rise[1](x), first], 1))
            return self.scores(x)

    return images(UNet(), 64)


def yolo() -> TorchModel:
    """A one-stage detector: C3 blocks, SPPF, upsampling, and boxes decoded over a grid."""
    import torch
    from torch import nn

    def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
        layer = nn.Conv2d(inputs, outputs, size, stride, (size - 1) // 2, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())

    class Yolo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first = conv(3, 16, 6, 2), conv(16, 32, 3, 2)
            self.second, self.third = conv(32, 64, 3, 2), conv(64, 64, 3, 2)
            self.narrow, self.wide = conv(64, 32, 1), conv(128, 64, 1)
            self.lateral, self.heads = conv(128, 64, 1), nn.ModuleList()
            self.heads = nn.ModuleList(nn.Conv2d(64, 3 * 9, 1) for _ in range(2))
            self.register_buffer("anchors", torch.rand(2, 1, 3, 1, 1, 2) * 20 + 5)

        def forward(self, pixel_values: Any) -> Any:
            fine = self.second(self.first(self.stem(pixel_values)))
            coarse = self.narrow(self.third(fine))
            pooled = [coarse]
            for _ in range(3):
                pooled.append(torch.max_pool2d(pooled[-1], 5, 1, 2))
            coarse = self.wide(torch.cat(pooled, 1))
            risen = nn.functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
            fine = self.lateral(torch.cat([risen, fine], 1))
            return torch.cat([self.boxes(0, fine, 8), self.boxes(1, coarse, 16)], 1)

        def boxes(self, index: int, x: Any, stride: int) -> Any:
            x = self.heads[index](x)
            batch, _, height, width = x.shape
            x = x.reshape(batch, 3, 9, height, width).permute(0, 1, 3, 4, 2).sigmoid()
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            grid = torch.stack([columns, rows], -1).to(x.dtype)
            centre = (x[..., :2] * 2 - 0.5 + grid) * stride
            size = (x[..., 2:4] * 2) ** 2 * self.anchors[index]
            return torch.cat([centre, size, x[..., 4:]], -1).reshape(batch, -1, 9)

    return images(Yolo(), 64)


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
