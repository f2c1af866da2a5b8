"""What people do with a model, tried on every family that ``patch`` takes.

    python -m tests.model_uses                     # every use of every family, a line each
    python -m tests.model_uses --only "ViT$" --use compile export
    python -m tests.model_uses --write             # and its part of docs/models.md

The models are those of ``model_zoo.py`` that work there. Each use runs in a process of its own within ``--limit``
seconds of CPU. One that fails is run again without the patch: what fails there as well is not the patch's fault.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import select
import signal
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import tokenpool_ext as tp
from bench import machine

try:
    from . import model_zoo
except ImportError:  # pytest puts this folder on the path
    import model_zoo  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "results" / "model-uses.json"
DOCUMENT = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by tests/model_uses.py -->", "<!-- end -->"


class Absent(Exception):
    """The model has no such thing."""


class Call:
    """A model's inputs: two samples."""

    def __init__(self, args: tuple, kwargs: dict) -> None:
        self.args, self.kwargs = args, kwargs
        self.packed = len(args) == 2  # patches of two images in one sequence, and their grids

    def on(self, model: nn.Module) -> list[torch.Tensor]:
        """The tensors it returns; the same draws each time."""
        torch.manual_seed(1)
        np.random.seed(1)
        return model_zoo.tensors(model(*self.args, **self.kwargs))

    def made(self, change: Callable) -> Call:
        return Call(*tree_map(lambda t: change(t, self.dim(t)), (self.args, self.kwargs)))

    def dim(self, t: torch.Tensor) -> int:
        """Where its samples are."""
        return 0 if self.packed or t.shape[0] == 2 else 1

    def swapped(self) -> Call:
        if self.packed:
            return self.made(lambda t, d: t if t.dtype == torch.long else t.flip(1))
        return self.made(lambda t, d: t.flip(d))

    def doubled(self) -> Call:
        pairs = zip(self.leaves(), self.swapped().leaves())
        joined = iter([torch.cat([a, b], self.dim(a)) for a, b in pairs])
        return self.made(lambda t, d: next(joined))

    def leaves(self) -> list[torch.Tensor]:
        return tree_leaves((self.args, self.kwargs))

    def half(self, i: int) -> Call:
        if self.packed:
            n = int(self.args[1][0].prod())
            return Call((self.args[0][:n] if i == 0 else self.args[0][n:], self.args[1][i : i + 1]), {})
        return self.made(lambda t, d: t.narrow(d, i, 1).clone())


def same(got: list, wanted: list, what: str, tolerance: float = 0.0) -> None:
    """Raises where tensors differ by more than ``tolerance`` of the largest value."""
    assert [t.shape for t in got] == [t.shape for t in wanted], f"{what}: other shapes"
    for a, b in zip(got, wanted):
        if torch.equal(a, b) or a.numel() == 0:
            continue
        a, b = a.double(), b.double()
        finite = b.isfinite()
        far = float((a - b)[finite].abs().amax() / b[finite].abs().amax().clamp(min=1e-9)) if finite.any() else 0.0
        assert torch.equal(finite, a.isfinite()) and far <= tolerance, f"{what}: {far:.1e} apart"


def same_kind(got: list, wanted: list) -> None:
    """Raises where tensors differ in type, or are not finite where those wanted are."""
    assert [t.dtype for t in got] == [t.dtype for t in wanted], "other types"
    assert all(t.isfinite().all() or not w.isfinite().all() for t, w in zip(got, wanted)), "not finite"


def loss_of(outputs: list[torch.Tensor]) -> torch.Tensor:
    return sum(t.float().square().mean() for t in outputs if t.requires_grad)  # type: ignore[return-value]


def gradients(model: nn.Module, call: Call) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(call.on(model)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(got: dict, wanted: dict, tolerance: float) -> None:
    missing = sorted(wanted.keys() ^ got.keys())
    assert not missing, f"gradients of {len(missing)} weights, such as {missing[0]}, are there only one time"
    wanted = {name: grad for name, grad in wanted.items() if grad.numel()}
    largest = max(float(g.abs().amax()) for g in wanted.values())
    for name, grad in wanted.items():
        far = float((got[name] - grad).abs().amax()) / largest
        assert far <= tolerance, f"gradient of {name}: {far:.1e} of the largest apart"


def without(model: nn.Module) -> nn.Module:
    return tp.unpatch(copy.deepcopy(model))


# --- the uses: (model, call); each raises where it fails --------------------------------------------------------------


def training(model: nn.Module, call: Call) -> None:
    """One step: the weights that learn are those that learn without the patch; then evaluation runs."""
    found = {}
    for which, m in (("without", without(model)), ("with", model)):
        found[which] = gradients(m.train(), call)
    assert found["with"].keys() == found["without"].keys(), "other weights have gradients"
    assert all(g.isfinite().all() for g in found["with"].values()), "gradients are not finite"
    before = [t.detach() for t in call.on(model.eval())]
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    with torch.no_grad():
        after = call.on(model)
    assert all(t.isfinite().all() or not b.isfinite().all() for t, b in zip(after, before)), "not finite after a step"
    assert any(not torch.equal(a, b) for a, b in zip(after, before)), "a step changes nothing"


def evaluation(model: nn.Module, call: Call) -> None:
    """Training mode and back gives the same bits; under ``inference_mode``, too."""
    with torch.no_grad():
        wanted = call.on(model)
        call.on(model.train())
        same(call.on(model.eval()), wanted, "after training mode")
    with torch.inference_mode():
        same(call.on(model), wanted, "in inference mode")


def autocast(model: nn.Module, call: Call) -> None:
    """bfloat16: the types are those without the patch, values and gradients finite."""
    plain = without(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, got = call.on(plain), call.on(model)
        loss = loss_of(got)
    same_kind(got, wanted)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), "gradients are not finite"


def half(model: nn.Module, call: Call) -> None:
    """Weights and inputs in bfloat16."""
    to = lambda t, d: t.bfloat16() if t.is_floating_point() else t  # noqa: E731
    call, model = call.made(to), model.bfloat16()
    with torch.no_grad():
        same_kind(call.on(model), call.on(without(model)))


@torch.no_grad()
def deepcopy(model: nn.Module, call: Call) -> None:
    """Gives the same bits, also when the first is unpatched."""
    wanted, other = call.on(model), copy.deepcopy(model)
    same(call.on(other), wanted, "a copy")
    tp.unpatch(model)
    same(call.on(other), wanted, "a copy after the first is unpatched")


@torch.no_grad()
def pickled(model: nn.Module, call: Call) -> None:
    """And ``torch.save``; the weights load into a model without the patch."""
    wanted = call.on(model)
    same(call.on(pickle.loads(pickle.dumps(model))), wanted, "pickle")
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    same(call.on(torch.load(file, weights_only=False)), wanted, "torch.load")
    without(model).load_state_dict(model.state_dict())


def checkpointing(model: nn.Module, call: Call) -> None:
    """The gradients of a training step, dropout and all, are those without checkpoints."""
    enable = getattr(model, "gradient_checkpointing_enable", None) or getattr(model, "set_grad_checkpointing", None)
    if enable is None or getattr(model, "supports_gradient_checkpointing", True) is False:
        raise Absent
    wanted = gradients(model.train(), call)
    enable()
    again = ran_again(model)
    same_gradients(gradients(model, call), wanted, 1e-5)
    assert again(), "no block ran again"


def ran_again(model: nn.Module) -> Callable[[], bool]:
    """Whether a part of the first block runs more than once from now on."""
    block, calls = tp.vit.finding.find_blocks(model).blocks[0], Counter()  # type: ignore[var-annotated]
    for m in block.modules():
        if m is not block and not list(m.children()):
            m.register_forward_pre_hook(lambda m, args: calls.update([m]))
    return lambda: max(calls.values(), default=0) > 1


@torch.no_grad()
def threads(model: nn.Module, call: Call) -> None:
    """Two at once, on other inputs, give what each gives alone."""
    calls = [call, call.swapped()]
    run = lambda c: model_zoo.tensors(model(*c.args, **c.kwargs))  # noqa: E731  # seeds are of all threads
    wanted = [run(c) for c in calls]
    wrong: list[str] = []

    def work(i):
        with torch.no_grad():
            try:
                for _ in range(4):
                    same(run(calls[i]), wanted[i], "in a thread")
            except Exception as error:
                wrong.append(line(error))

    both = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    [t.start() for t in both]
    [t.join() for t in both]
    assert not wrong, wrong[0]


def ddp(model: nn.Module, call: Call) -> None:
    """Two processes with a sample each have the gradients of one with both; no dropout, double precision."""
    import torch.distributed as dist

    model.double().eval()
    call = call.made(lambda t, d: t.double() if t.is_floating_point() else t)
    with torch.no_grad():
        whole, parts = call.on(model), call.half(0).on(model)
    chosen = []  # of the outputs those that are half as large: not what is of all pairs of samples
    for i, (a, b) in enumerate(zip(whole, parts)):
        differ = [(x, y) for x, y in zip(a.shape, b.shape) if x != y]
        if len(differ) == 1 and (call.packed or differ[0][0] == 2 * differ[0][1]):
            chosen.append(i)
    shares = [1.0, 1.0]
    if call.packed:  # the means are of unequal numbers
        sizes = [len(call.half(i).args[0]) for i in (0, 1)]
        shares = [2 * n / sum(sizes) for n in sizes]
    pick = lambda outputs: [outputs[i] for i in chosen]  # noqa: E731

    with tempfile.TemporaryDirectory() as folder:

        def rank(i: int) -> str:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=i, world_size=2)
            wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
            (shares[i] * loss_of(pick(call.half(i).on(wrapped)))).backward()
            torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"{folder}/{i}.pt")
            return ""

        ranks = [Isolated(partial(rank, i), 30) for i in (0, 1)]
        words = [r.result() for r in ranks]
        assert not any(words), next(w for w in words if w)
        found = [torch.load(f"{folder}/{i}.pt") for i in (0, 1)]
    loss_of(pick(call.on(model))).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for grads in found:
        same_gradients({n: g for n, g in grads.items() if n in wanted or g.any()}, wanted, 1e-4)


@torch.no_grad()
def compiled(model: nn.Module, call: Call) -> None:
    """One graph, two batch sizes."""
    run = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for c in (call, call.doubled()):
        same(c.on(run), c.on(model), f"batch {2 if c is call else 4}", 1e-4)


@torch.no_grad()
def exported(model: nn.Module, call: Call) -> None:
    """Any batch size."""
    axis = lambda t, d: {d: torch.export.Dim.DYNAMIC}  # noqa: E731
    shapes = tree_map(lambda t: axis(t, call.dim(t)), (call.args, call.kwargs))
    shapes = (*shapes[0],) if call.args else shapes[1]
    program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False).module()
    for c in (call, call.doubled()):
        same(c.on(program), c.on(model), f"batch {2 if c is call else 4}", 1e-4)


USES: dict[str, Callable] = {
    "training": training,
    "evaluation": evaluation,
    "autocast": autocast,
    "bfloat16": half,
    "deepcopy": deepcopy,
    "pickle": pickled,
    "checkpointing": checkpointing,
    "threads": threads,
    "DDP": ddp,
    "compile": compiled,
    "export": exported,
}

# --- how they are run -------------------------------------------------------------------------------------------------


class Isolated:
    """``work``, which returns a text, in a process of its own for ``limit`` seconds; a text tells of an exception."""

    def __init__(self, work: Callable[[], str], limit: float) -> None:
        self.limit = limit
        self.pipe, end = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(end)
            return
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit)))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            torch.set_num_threads(1)  # makes torch's pool anew, before autograd's threads do at once and abort
            text = work()
        except BaseException as error:
            text = line(error)
        os.write(end, text.encode()[:4000])
        os._exit(0)

    def result(self) -> str:
        ready = select.select([self.pipe], [], [], 20 * self.limit)[0]  # of a machine that does other work, too
        text = os.read(self.pipe, 4096).decode() if ready else "waits for ever"
        os.close(self.pipe)
        if not ready:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    kill(self.pid, signal.SIGKILL)
        end = os.waitpid(self.pid, 0)[1] & 127
        ended = f"not done in {self.limit:.0f} s" if end in (signal.SIGXCPU, signal.SIGKILL) else f"signal {end}"
        return text or (ended if end else "")


def line(error: BaseException) -> str:
    words = next((w.strip() for w in str(error).splitlines() if w.strip()), "")
    return f"{type(error).__name__}: {words}"[:300]


def build(name: str, patch: bool) -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    model, args, kwargs = model_zoo.zoo(True)[name]()
    model_zoo.liven(model)
    for m in model.modules():  # whether a layer is dropped follows from all draws before, which pooling makes fewer
        for where in (m, getattr(m, "config", m)):
            for setting in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
                if getattr(where, setting, 0):
                    setattr(where, setting, 0.0)
    return (tp.patch(model, keep_ratio=0.5) if patch else model), Call(args, kwargs)


def tried(name: str, use: str, patch: bool) -> str:
    """Empty where it works, "-" where there is no such thing, else what went wrong."""
    try:
        USES[use](*build(name, patch))
    except Absent:
        return "-"
    return ""


def family(name: str, uses: list[str], limit: float) -> tuple[str, dict[str, str]]:
    """(name, use -> "ok", "-", "unpatched too: why" or "fails: why")."""
    try:
        build(name, False)  # the imports, once for all uses
    except ImportError as error:
        return name, {"no use": f"tried: {line(error)}"}
    found = {}
    for use in uses:
        why = Isolated(partial(tried, name, use, True), limit).result()
        if why not in ("", "-"):
            alone = Isolated(partial(tried, name, use, False), limit).result()
            why = f"unpatched too: {alone}" if alone else f"fails: {why}"
        found[use] = why or "ok"
    return name, found


def keep(name: str, found: dict[str, str]) -> None:
    """In the record, and in its table in docs/models.md."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"families": {}}
    record["versions"] = model_zoo.versions()
    record["families"].setdefault(name, {}).update(found)
    record["families"] = dict(sorted(record["families"].items()))
    machine.write(RECORD, record)
    lines = [f"`python -m tests.model_uses --write` on a CPU; {record['versions']}. Numbers are of families.", ""]
    lines += ["| use | works | no such thing | fails unpatched, too | fails |", "|---|---|---|---|---|"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for use in USES:
        words = {name: uses[use] for name, uses in record["families"].items() if use in uses}
        counts = [sum(w.startswith(kind) for w in words.values()) for kind in ("ok", "-", "unpatched", "fails")]
        lines.append(f"| {use}: {(USES[use].__doc__ or '').strip()} | " + " | ".join(map(str, counts)) + " |")
        for name, word in words.items():
            if word not in ("ok", "-"):
                reasons.setdefault((use, word), []).append(name)
    lines += ["", "| use | not ok | families |", "|---|---|---|"]
    for (use, word), names in reasons.items():
        lines.append(f"| {use} | {word.replace('|', '/')[:120]} | {', '.join(names)} |")
    text, table = DOCUMENT.read_text(), "\n".join(lines)
    part = rf"(?s)({re.escape(BEGIN)}\n).*?({re.escape(END)})"
    DOCUMENT.write_text(re.sub(part, lambda m: f"{m[1]}{table}\n{m[2]}", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression of names")
    parser.add_argument("--use", nargs="+", choices=list(USES), default=list(USES))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--limit", type=float, default=60, help="seconds of CPU for each use")
    parser.add_argument("--write", action="store_true", help="keep the record; families and uses not run stay in it")
    options = parser.parse_args()
    names = [n for n in model_zoo.zoo(True) if n in tp.supported() and re.search(options.only, n)]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name in ("hand-written", "transformers ViT", "timm vit_small_patch16_224"):  # imports that all would repeat
        with contextlib.suppress(ImportError):
            compiled(*build(name, False))
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        for name, found in pool.imap(partial(family, uses=options.use, limit=options.limit), names, chunksize=1):
            print(f"{name:<40}", "; ".join(f"{use} {word}" for use, word in found.items()), flush=True)
            if options.write and "no use" not in found:
                keep(name, found)


if __name__ == "__main__":
    main()
