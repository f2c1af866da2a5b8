"""Models by name for the command line: with random weights, since cost and speed do not depend on them."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import nn

__all__ = ["PLAIN_VITS", "build", "whole_numbers"]

# name -> (image side, width, blocks, heads), patch 16, MLP ratio 4: the models of arXiv 2110.03860
PLAIN_VITS = {
    "deit-ti": (224, 192, 12, 3),
    "deit-e252": (224, 252, 12, 6),
    "deit-e318": (224, 318, 12, 6),
    "deit-s": (224, 384, 12, 6),
    "deit-b": (224, 768, 12, 12),
    "vit-b-384": (384, 768, 12, 12),
    "vit-l-384": (384, 1024, 24, 16),
}


def build(name: str, device: str = "cpu") -> nn.Module:
    """A model in eval mode.

    Args:
        name: one of :data:`PLAIN_VITS` (needs transformers); ``FILE.py:FUNCTION`` that returns a module; or the name
            of a timm model.
        device: "meta" makes it without memory, for counting.

    Raises:
        ValueError: no such model; the message lists what there is.
    """
    with torch.device(device):
        if name in PLAIN_VITS:
            return _plain(*PLAIN_VITS[name]).eval()
        if ".py:" in name:
            return _from_file(*name.rsplit(":", 1)).eval()
        try:
            import timm

            model: nn.Module = timm.create_model(name, pretrained=False)
            return model.eval()
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"--model: expected one of {', '.join(PLAIN_VITS)}, FILE.py:FUNCTION or the name of a timm model, got"
                f" {name!r} ({error})"
            ) from None


def _plain(side: int, width: int, depth: int, heads: int) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"--model: transformers is needed for {', '.join(PLAIN_VITS)} ({error})") from None
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=side,
        patch_size=16,
        num_labels=1000,
    )
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


def whole_numbers(text: str) -> list[int]:
    """The value of an option such as ``1,8,32``."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers, comma-separated, got {text!r}") from None


def _from_file(path: str, function: str) -> nn.Module:
    if not Path(path).is_file():
        raise ValueError(f"--model: no such file: {path}")
    spec = importlib.util.spec_from_file_location("tokenpool_ext_model", path)
    assert spec is not None and spec.loader is not None, f"{path} is a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--model: {path} has no function {function!r}")
    model = getattr(module, function)()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: {path}:{function} must return an nn.Module, got {type(model).__name__}")
    return model
