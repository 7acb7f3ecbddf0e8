"""Models small enough to plan for in a moment."""

from __future__ import annotations

from dataclasses import replace

import onnx

from sparse_tvm.models.bert import BertConfig, build_bert

SMALL = BertConfig(layers=2, hidden=256, heads=4, intermediate=1024, vocabulary=500)
TARGET = "x86-64-v4"
"""Predicted only, whatever machine tests run on."""


def small_bert(sequence: int | str = 64, layers: int = SMALL.layers) -> onnx.ModelProto:
    return build_bert(replace(SMALL, layers=layers), sequence=sequence)
