"""Find the transformer blocks of a model by structure, its prefix tokens, and inputs it can be tried on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

ATTENTION = re.compile(r"att(n|ention)|mixer", re.IGNORECASE)
PREFERRED = re.compile(r"vision|visual|image|trunk")
SECOND = re.compile(r"encoder|blocks|layers|resblocks")
LESS = re.compile(
    r"text|language|decoder|predictor|context|fusion|qformer|projector|prompt|neck|head\b|token_only|cls|class"
)
PREFIX = re.compile(r"^(cls|class|dist|distillation|reg|register|storage|camera|temporal_cls)[a-z_]*$")
LISTS = (nn.ModuleList, nn.Sequential)
SUFFIX = re.compile(r"^(det|detection)_tokens?$")


class BlockList(NamedTuple):
    """A list of transformer blocks in a model."""

    path: str  # its name in the model
    owners: list[nn.Module]  # the modules around it, the innermost first
    blocks: list[nn.Module]

    @property
    def name(self) -> str:
        return f"{self.path or 'blocks'} ({len(self.blocks)} x {self.block_name})"

    @property
    def block_name(self) -> str:
        return type(self.blocks[0]).__name__


def find_blocks(model: nn.Module, blocks: Any = None, caller: str = "patch") -> BlockList:
    """The block list named by ``blocks`` (a dotted path, or the blocks themselves), or the one the model has.

    Raises:
        TypeError: no module; no list of transformer blocks, or stages of them; the class is named.
        ValueError: several lists of equal rank; ``blocks`` names none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{caller}: model is a ScriptModule, whose code is fixed; patch the Python model")
    if blocks is not None:
        return given_blocks(model, blocks, caller)
    found = candidates(model)
    name = type(model).__name__
    if not found:
        raise TypeError(
            f"{caller}: no list of transformer blocks in {name}: two or more modules of one class, each a whole block"
            " with attention and residual sums, in a ModuleList or Sequential; name them with blocks='path.to.list',"
            " make one module of parts that are summed in the model's own loop, or put tokenpool_ext.TokenPooling"
            " between the layers yourself"
        )
    stages = hierarchy(found)
    if stages and is_one_list(model, stages):
        return given_blocks(model, [block for stage in stages for block in stage.blocks], caller)
    if stages:
        raise TypeError(
            f"{caller}: {name} is hierarchical: its {stages[0].block_name} stand in {len(stages)} stages"
            f" ({', '.join(b.path for b in stages[:4])}) that change the number of tokens or their width on a"
            " grid, which pooled tokens no longer fill; name one stage with blocks='...' if its blocks take any tokens"
        )
    best = max(rank(b) for b in found)
    found = [b for b in found if rank(b) == best]
    if len(found) > 1:
        names = ", ".join(repr(b.path) for b in found)
        raise ValueError(
            f"{caller}: model must hold one list of blocks, {name} has {len(found)} ({names}); name one"
            f" with blocks={found[0].path!r}"
        )
    return found[0]


def given_blocks(model: nn.Module, blocks: Any, caller: str) -> BlockList:
    listed = blocks
    if isinstance(blocks, str):
        try:
            listed = model.get_submodule(blocks)
        except AttributeError:
            raise ValueError(f"{caller}: blocks={blocks!r} is no module of {type(model).__name__}") from None
    members = list(listed) if isinstance(listed, Iterable) else []
    if members and all(isinstance(m, nn.ModuleList) for m in members):  # of lists
        members = [block for inner in members for block in inner]
    inside = {module: name for name, module in model.named_modules()}
    if not members or not all(isinstance(m, nn.Module) and m in inside for m in members):
        raise ValueError(
            f"{caller}: blocks must be the dotted path of a list of modules, or modules of the model in a list, got"
            f" {blocks!r:.80}"
        )
    path = ".".join(os.path.commonprefix([inside[m].split(".")[:-1] for m in members]))  # what is around all of them
    return BlockList(path, owners_of(model, path), members)


def candidates(model: nn.Module) -> list[BlockList]:
    """Outermost ModuleLists and Sequentials of two or more modules of one class that hold an attention."""
    found: list[BlockList] = []
    for path, module in model.named_modules():  # each once, also where torch.compile's wrapper shows it again
        if not isinstance(module, LISTS) or any(path.startswith(b.path + ".") for b in found):
            continue
        members = list(module)
        if len(members) < 2 or len({type(m).__qualname__ for m in members}) > 1 or is_attention(members[0]):
            continue
        if all(attends(m) and not isinstance(m, (*LISTS, nn.ModuleDict)) for m in members):
            found.append(BlockList(path, owners_of(model, path), members))
    return found


def attends(module: nn.Module) -> bool:
    """Whether an attention seems to be inside."""
    return any(ATTENTION.search(type(m).__name__) or ATTENTION.search(n) for n, m in module.named_modules() if n) or (
        sum(isinstance(m, nn.Linear) for m in module.modules()) >= 4
    )


def is_attention(module: nn.Module) -> bool:
    """An attention itself, not a block around one."""
    return (
        bool(ATTENTION.search(type(module).__name__))
        and not any(ATTENTION.search(type(m).__name__) for n, m in module.named_modules() if n)
        and not any(isinstance(m, (nn.LayerNorm, nn.Sequential)) for m in module.modules())
    )


def rank(blocks: BlockList) -> tuple:
    path = blocks.path.lower()
    return (not LESS.search(path), bool(PREFERRED.search(path)), bool(SECOND.search(path)))


def hierarchy(found: list[BlockList]) -> list[BlockList]:
    """Lists of blocks that are stages of one: siblings of one class, or nested in blocks that are stages."""
    for first in found:
        if stages := nested_stages(first):
            return stages
        mine = re.sub(r"\d+", "#", first.path)
        stages = [b for b in found if re.sub(r"\d+", "#", b.path) == mine and b.block_name == first.block_name]
        if len(stages) > 1:
            return stages
    return []


def is_one_list(model: nn.Module, stages: list[BlockList]) -> bool:
    """Whether the stages are all that a list holds, of one width: then it is a list of blocks, in groups."""
    lists = model.get_submodule(parent_of(stages[0].path))
    inner = [model.get_submodule(stage.path) for stage in stages]
    widths = {block_width(block) for stage in stages for block in stage.blocks}
    return isinstance(lists, LISTS) and list(lists) == inner and len(widths) == 1


def parent_of(path: str) -> str:
    return path.rpartition(".")[0]


def nested_stages(blocks: BlockList) -> list[BlockList]:
    """Lists of several blocks inside the members of a list."""
    members = enumerate(blocks.blocks)
    inner = [b._replace(path=f"{blocks.path}.{i}.{b.path}") for i, member in members for b in candidates(member)]
    return inner if len(inner) > 1 else []


def owners_of(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules around the list at ``path``, the innermost first, the model last."""
    owners = list(accumulate(path.split(".")[:-1], getattr, initial=model))
    return [m for m in reversed(owners) if not isinstance(m, LISTS)]


def token_parameters(blocks: BlockList) -> list[tuple[str, nn.Parameter]]:
    """Parameters around the blocks that are tokens of their own: class, register, detection..."""
    for owner in blocks.owners:
        near = list(owner.named_parameters(recurse=False))
        for name, child in owner.named_children():
            if child in blocks.owners or LESS.search(name) or candidates(child):  # another part's tokens
                continue
            near += [(f"{name}.{n}", p) for n, p in child.named_parameters() if n.count(".") <= 1]
        tokens = []
        for name, p in near:
            last = name.split(".")[-1]
            named = (PREFIX.match(last) or SUFFIX.match(last)) and re.search(r"token|embed|cls", last)
            if named and "pos" not in last and not last.endswith("bias") and p.dim() <= 3:
                tokens.append((last, p))
        if tokens:
            return tokens
    return []


def count_prefix(blocks: BlockList) -> tuple[int, int]:
    """(prefix, suffix): tokens that stand for no part of the input."""
    prefix = suffix = 0
    for last, parameter in token_parameters(blocks):
        count = 1 if parameter.dim() == 1 else parameter.shape[-2]
        if SUFFIX.match(last):
            suffix += count
        else:
            prefix += count
    for owner in blocks.owners:
        told = getattr(owner, "num_prefix_tokens", None)
        if isinstance(told, int) and not isinstance(told, bool):
            return told, suffix
    if not prefix and any(is_text(owner) for owner in blocks.owners[:2]):
        prefix = 1  # what a text starts with is read by its pooler
    return prefix, suffix


def is_text(owner: nn.Module) -> bool:
    """Whether it has a table of words; I-BERT's is no ``nn.Embedding``."""

    def is_table(m: nn.Module) -> bool:
        return isinstance(m, nn.Embedding) or ("Embed" in type(m).__name__ and hasattr(m, "weight"))

    return any(is_table(m) and re.search(r"word|tok", name) for name, m in owner.named_modules())


def is_mixed(blocks: BlockList) -> bool:
    """Whether words and patches stand in one sequence."""
    for owner in blocks.owners:
        outside = [m for n, m in owner.named_children() if m not in blocks.owners]
        patches = any(isinstance(m, (nn.Conv2d, nn.Conv3d)) for child in outside for m in child.modules())
        if is_text(owner) and patches:
            return len(candidates(owner)) == 1
    return False


# --- inputs to try a model on -----------------------------------------------------------------------------------------


def examples(owner: nn.Module) -> Iterator[tuple[tuple, dict]]:
    """Made-up inputs of a batch of two that ``owner`` may take, likely ones first."""
    config = getattr(owner, "config", None)
    parameter = next(owner.parameters())
    like: dict[str, Any] = dict(device=parameter.device, dtype=parameter.dtype)
    generator = torch.Generator("cpu").manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(**like)

    def words(n: int) -> torch.Tensor:
        high = setting(config, "vocab_size", default=100)
        return torch.randint(5, max(high, 6), (2, n), generator=generator, device="cpu").to(parameter.device)

    main = getattr(owner, "main_input_name", None)
    size = image_size(owner)
    channels = setting(config, "num_channels", "in_chans", "in_channels", default=None) or stem_channels(owner) or 3
    patch, merge = setting(config, "patch_size", default=None), setting(config, "spatial_merge_size", default=None)
    if isinstance(patch, int) and merge:
        # patches of two images packed into one sequence, and their grids
        inputs = channels * patch**2 * setting(config, "temporal_patch_size", default=1)
        grid = torch.tensor([[1, 4 * merge, 4 * merge], [1, 2 * merge, 4 * merge]], device=parameter.device)
        yield (noise(24 * merge**2, inputs), grid), {}
    if main == "input_ids":
        yield (), {"input_ids": words(12)}
        yield (), {"input_ids": words(12), "decoder_input_ids": words(5)}
        for side in size:
            yield (), {"input_ids": words(12), "pixel_values": noise(2, channels, *side)}
    elif main == "input_features":
        mel = setting(config, "num_mel_bins", "feature_size", default=80)
        length = 2 * setting(config, "max_source_positions", default=50)
        yield (), {"input_features": noise(2, mel, length)}
        yield (), {"input_features": noise(2, mel, length), "decoder_input_ids": words(5)}
        yield (), {"input_features": noise(2, 100, mel)}
    elif main == "input_values":
        length = setting(config, "max_length", default=1024)
        yield (), {"input_values": noise(2, length, setting(config, "num_mel_bins", default=128))}
        yield (), {"input_values": noise(2, 16000)}
    for side in size:
        yield (noise(2, channels, *side),), {}
        frames = setting(config, "num_frames", "frames_per_clip", default=None)
        if frames:
            yield (noise(2, frames, channels, *side),), {}
        if main and "pixel" in main and main != "pixel_values":
            yield (), {main: noise(2, channels, *side)}
    width = setting(config, "hidden_size", "d_model", default=None) or block_width(owner)
    if width:
        yield (noise(2, 10, width),), {}
    if main is None:
        yield (words(12),), {}


def setting(config: Any, *names: str, default: Any) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, (list, tuple, dict)):
            return value
    for inner in ("vision_config", "text_config", "audio_config", "encoder_config"):
        if getattr(config, inner, None) is not None and getattr(config, inner) is not config:
            value = setting(getattr(config, inner), *names, default=None)
            if value is not None:
                return value
    return default


def image_size(owner: nn.Module) -> list[tuple[int, int]]:
    """Likely (height, width) of the owner's images."""
    sizes: list[Any] = []
    for module in (owner, *owner.children()):
        config = getattr(module, "config", None)
        for holder in (module, config, getattr(config, "vision_config", None), getattr(module, "patch_embed", None)):
            for name in ("image_size", "img_size", "input_size", "crop_size"):
                sizes.append(getattr(holder, name, None))
        cfg = getattr(module, "default_cfg", None)
        if isinstance(cfg, dict) and cfg.get("input_size"):
            sizes.append(tuple(cfg["input_size"])[1:])
    made = []
    for size in [*sizes, 224]:
        if isinstance(size, int) and not isinstance(size, bool):
            size = (size, size)
        if isinstance(size, Iterable) and not isinstance(size, (str, dict)):
            size = tuple(size)
            if len(size) == 2 and all(isinstance(s, int) for s in size) and size not in made:
                made.append(size)
    return made


def stem_channels(owner: nn.Module) -> int | None:
    conv = next((m for m in owner.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    return None if conv is None else conv.in_channels


def block_width(module: nn.Module) -> int | None:
    """Features a token, as its first norm or projection tells."""
    for m in module.modules():
        shape = getattr(m, "normalized_shape", None)
        if shape:
            return shape if isinstance(shape, int) else tuple(shape)[-1]
        weight = getattr(m, "weight", None)
        if "norm" in type(m).__name__.lower() and isinstance(weight, torch.Tensor) and weight.dim() == 1:
            return weight.shape[0]
        if isinstance(m, nn.Linear):
            return m.in_features
    return None
