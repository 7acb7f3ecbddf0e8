"""Convolutional networks that no library of models has, in any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from zoo_doors import TorchModel, torchvision

BATCH = {0: "batch"}
BATCH_AND_SIZE = {0: "batch", 2: "height", 3: "width"}


def images(
    module: Any, *size: int, channels: int = 3, axes: Mapping[int, str] = BATCH
) -> TorchModel:
    """A module of one batch of images, square if one size is all there is."""
    import torch

    x = torch.randn(2, channels, size[0], size[-1])
    return TorchModel(module, (x,), ["pixel_values"], {"pixel_values": axes})


def unet(widths: Sequence[int] = (16, 32, 64), size: int = 64) -> TorchModel:
    """U-Net with transposed convolutions, over images that can be halved at each level."""
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

    levels = list(pairwise(widths))

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = block(3, widths[0])
            self.down = nn.ModuleList(block(fine, coarse) for fine, coarse in levels)
            self.rise = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in levels)
            self.up = nn.ModuleList(block(2 * fine, fine) for fine, _ in levels)
            self.scores = nn.Conv2d(widths[0], 2, 1)

        def forward(self, x: Any) -> Any:
            passed = [self.first(x)]
            for down in self.down:
                passed.append(down(torch.max_pool2d(passed[-1], 2)))
            x = passed.pop()
            for rise, up in zip(reversed(self.rise), reversed(self.up), strict=True):
                x = up(torch.cat([rise(x), passed.pop()], 1))
            return self.scores(x)

    return images(UNet(), size)


def yolo(width: int = 8, depth: int = 1, classes: int = 4, size: int = 64) -> TorchModel:
    """YOLOv5: C3 blocks, SPPF, a pyramid down and up, and boxes decoded over three grids.

    With 32 channels, a depth of 1 and 80 classes it is YOLOv5s.
    """
    import torch
    from torch import nn

    def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
        pad = 2 if kernel == 6 else kernel // 2
        layer = nn.Conv2d(inputs, outputs, kernel, stride, pad, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())

    class Bottleneck(nn.Module):
        def __init__(self, channels: int, shortcut: bool) -> None:
            super().__init__()
            self.layers = nn.Sequential(conv(channels, channels), conv(channels, channels, 3))
            self.shortcut = shortcut

        def forward(self, x: Any) -> Any:
            return x + self.layers(x) if self.shortcut else self.layers(x)

    class C3(nn.Module):
        def __init__(self, inputs: int, outputs: int, repeats: int, shortcut: bool = True) -> None:
            super().__init__()
            half = outputs // 2
            self.left, self.right = conv(inputs, half), conv(inputs, half)
            self.blocks = nn.Sequential(*(Bottleneck(half, shortcut) for _ in range(repeats)))
            self.joined = conv(outputs, outputs)

        def forward(self, x: Any) -> Any:
            return self.joined(torch.cat([self.blocks(self.left(x)), self.right(x)], 1))

    class SPPF(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.narrow = conv(channels, channels // 2)
            self.wide = conv(2 * channels, channels)

        def forward(self, x: Any) -> Any:
            pooled = [self.narrow(x)]
            for _ in range(3):
                pooled.append(torch.max_pool2d(pooled[-1], 5, 1, 2))
            return self.wide(torch.cat(pooled, 1))

    def doubled(x: Any) -> Any:
        return nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")

    class Yolo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [width * 2**level for level in range(5)]
            self.stem = conv(3, width, 6, 2)
            repeats = [depth, 2 * depth, 3 * depth, depth]
            self.stages = nn.ModuleList(
                nn.Sequential(conv(fine, coarse, 3, 2), C3(coarse, coarse, count))
                for (fine, coarse), count in zip(pairwise(widths), repeats, strict=True)
            )
            *_, fine, middle, coarse = widths
            self.pooled = SPPF(coarse)
            self.narrow = nn.ModuleList([conv(coarse, middle), conv(middle, fine)])
            self.down = nn.ModuleList(
                [C3(coarse, middle, depth, False), C3(middle, fine, depth, False)]
            )
            self.strided = nn.ModuleList([conv(fine, fine, 3, 2), conv(middle, middle, 3, 2)])
            self.up = nn.ModuleList(
                [C3(middle, middle, depth, False), C3(coarse, coarse, depth, False)]
            )
            self.heads = nn.ModuleList(
                nn.Conv2d(channels, 3 * (5 + classes), 1) for channels in (fine, middle, coarse)
            )
            self.register_buffer("anchors", torch.rand(3, 1, 3, 1, 1, 2) * 20 + 5)

        def forward(self, pixel_values: Any) -> Any:
            x, passed = self.stem(pixel_values), []
            for stage in self.stages:
                x = stage(x)
                passed.append(x)
            _, fine, middle, _ = passed
            first = self.narrow[0](self.pooled(x))
            second = self.narrow[1](self.down[0](torch.cat([doubled(first), middle], 1)))
            x = self.down[1](torch.cat([doubled(second), fine], 1))
            found = [x]
            for strided, up, other in zip(self.strided, self.up, (second, first), strict=True):
                found.append(up(torch.cat([strided(found[-1]), other], 1)))
            boxes = [self.boxes(level, x, 8 * 2**level) for level, x in enumerate(found)]
            return torch.cat(boxes, 1)

        def boxes(self, index: int, x: Any, stride: int) -> Any:
            x = self.heads[index](x)
            batch, _, height, width = x.shape
            x = x.reshape(batch, 3, 5 + classes, height, width).permute(0, 1, 3, 4, 2).sigmoid()
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            grid = torch.stack([columns, rows], -1).to(x.dtype)
            centre = (x[..., :2] * 2 - 0.5 + grid) * stride
            extent = (x[..., 2:4] * 2) ** 2 * self.anchors[index]
            return torch.cat([centre, extent, x[..., 4:]], -1).reshape(batch, -1, 5 + classes)

    return images(Yolo(), size)


def pointnet(points: int = 1024, classes: int = 40) -> TorchModel:
    """PointNet: layers over each point, the largest of all points, and learnt rotations."""
    import torch
    from torch import nn

    def shared(*widths: int) -> nn.Sequential:
        layers = [
            layer
            for inputs, outputs in pairwise(widths)
            for layer in (nn.Conv1d(inputs, outputs, 1), nn.BatchNorm1d(outputs), nn.ReLU())
        ]
        return nn.Sequential(*layers)

    def head(*widths: int) -> nn.Sequential:
        layers = [
            layer
            for inputs, outputs in pairwise(widths)
            for layer in (nn.Linear(inputs, outputs), nn.ReLU())
        ]
        return nn.Sequential(*layers[:-1])

    class Rotation(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size, self.shared = size, shared(size, 64, 128, 1024)
            self.head = head(1024, 512, 256, size * size)

        def forward(self, x: Any) -> Any:
            turned = self.head(self.shared(x).amax(2)).reshape(-1, self.size, self.size)
            return torch.matmul(turned + torch.eye(self.size), x)

    class PointNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned, self.first = Rotation(3), shared(3, 64)
            self.rest = nn.Sequential(Rotation(64), shared(64, 128, 1024))
            self.scores = head(1024, 512, 256, classes)

        def forward(self, x: Any) -> Any:
            return self.scores(self.rest(self.first(self.turned(x))).amax(2))

    return TorchModel(PointNet(), (torch.randn(2, 3, points),), ["points"], {"points": BATCH})


def super_resolution(
    widths: Sequence[int] = (64, 64, 32), factor: int = 3, size: int = 224
) -> TorchModel:
    """ESPCN: convolutions at low resolution, and channels that become pixels."""
    from torch import nn

    layers: list[Any] = []
    kernels = (5, *[3] * len(widths))
    for (inputs, outputs), kernel in zip(pairwise([1, *widths, factor**2]), kernels, strict=True):
        layers += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU()]
    module = nn.Sequential(*layers[:-1], nn.PixelShuffle(factor))
    return images(module, size, channels=1, axes=BATCH_AND_SIZE)


def ocr_detector(size: int = 640) -> TorchModel:
    """PP-OCR's way to find text: a narrow MobileNetV3, a pyramid, transposed convolutions."""
    import torch
    from torch import nn

    features = torchvision().models.mobilenet_v3_large(width_mult=0.5).features
    stages = nn.ModuleList([features[:4], features[4:7], features[7:13], features[13:]])
    widths, wide = (16, 24, 56, 480), 96

    def doubled(x: Any, times: int = 1) -> Any:
        return nn.functional.interpolate(x, scale_factor=2.0**times, mode="nearest")

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = stages
            self.lateral = nn.ModuleList(nn.Conv2d(n, wide, 1, bias=False) for n in widths)
            self.narrow = nn.ModuleList(
                nn.Conv2d(wide, wide // 4, 3, padding=1, bias=False) for _ in widths
            )
            quarter = wide // 4
            self.head = nn.Sequential(
                nn.Conv2d(wide, quarter, 3, padding=1, bias=False),
                nn.BatchNorm2d(quarter),
                nn.ReLU(),
                nn.ConvTranspose2d(quarter, quarter, 2, 2),
                nn.BatchNorm2d(quarter),
                nn.ReLU(),
                nn.ConvTranspose2d(quarter, 1, 2, 2),
                nn.Sigmoid(),
            )

        def forward(self, x: Any) -> Any:
            found = []
            for stage, lateral in zip(self.stages, self.lateral, strict=True):
                x = stage(x)
                found.append(lateral(x))
            for level in (2, 1, 0):
                found[level] = found[level] + doubled(found[level + 1])
            parts = [narrow(x) for narrow, x in zip(self.narrow, found, strict=True)]
            scaled = [parts[0], *(doubled(x, i) for i, x in enumerate(parts) if i)]
            return self.head(torch.cat(scaled[::-1], 1))

    return images(Detector(), size)


def ocr_recogniser(width: int = 320, characters: int = 6625) -> TorchModel:
    """PP-OCR's way to read a line: depthwise layers until it is one row, then a transformer."""
    import torch
    from torch import nn

    def conv(
        inputs: int, outputs: int, kernel: Any, stride: Any = 1, groups: int = 1, act: Any = None
    ) -> nn.Sequential:
        pads = tuple(k // 2 for k in kernel)
        layer = nn.Conv2d(inputs, outputs, kernel, stride, pads, groups=groups, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs), act or nn.Hardswish())

    def separable(inputs: int, outputs: int, kernel: int, stride: Any = 1) -> nn.Sequential:
        depthwise = conv(inputs, inputs, (kernel, kernel), stride, inputs)
        return nn.Sequential(depthwise, conv(inputs, outputs, (1, 1)))

    half = (2, 1)
    backbone = nn.Sequential(
        conv(3, 16, (3, 3), 2),
        separable(16, 32, 3),
        separable(32, 64, 3),
        separable(64, 64, 3),
        separable(64, 128, 3, half),
        separable(128, 128, 3),
        separable(128, 256, 3, half),
        *(separable(256, 256, 5) for _ in range(5)),
        separable(256, 512, 5, half),
        separable(512, 512, 5),
        nn.AvgPool2d(2, 2),
    )
    hidden, heads = 120, 8

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
            self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
            self.inner = nn.Sequential(
                nn.Linear(hidden, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, hidden)
            )

        def forward(self, x: Any) -> Any:
            batch, length, _ = x.shape
            qkv = self.qkv(self.norms[0](x)).reshape(batch, length, 3, heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3) * (hidden // heads) ** -0.5).softmax(3)
            x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, hidden))
            return x + self.inner(self.norms[1](x))

    class Recogniser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone
            self.narrow = nn.Sequential(
                conv(512, 64, (1, 3), act=nn.SiLU()), conv(64, hidden, (1, 1), act=nn.SiLU())
            )
            self.blocks = nn.Sequential(Block(), Block(), nn.LayerNorm(hidden))
            self.wide = conv(hidden, 512, (1, 1), act=nn.SiLU())
            self.joined = nn.Sequential(
                conv(1024, 64, (1, 3), act=nn.SiLU()), conv(64, 64, (1, 1), act=nn.SiLU())
            )
            self.characters = nn.Linear(64, characters)

        def forward(self, line: Any) -> Any:
            x = self.backbone(line)
            y = self.blocks(self.narrow(x).flatten(2).transpose(1, 2))
            y = self.wide(y.transpose(1, 2)[:, :, None])
            x = self.joined(torch.cat([x, y], 1))
            return self.characters(x.flatten(2).transpose(1, 2)).softmax(2)

    return images(Recogniser(), 48, width)
