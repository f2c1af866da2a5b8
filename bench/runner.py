"""One problem over every provider -> records.

Every provider gets the same tokens and the same initial centers. A slow one is timed on fewer images (`images_timed`);
times are per image, so they compare. What a provider returns is checked: its centers' loss, the mean over images of
sum_i min_j |x_i - c_j|^2, must equal the reference's (plain float64 Lloyd, below) within the recorded tolerance.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from . import floor, machine, ours, peers, timing, tokens
from .problem import Problem

TOLERANCE = {"float64": 2e-3, "float32": 2e-3, "bfloat16": 1e-2, "float16": 5e-3}
# K-Medoids: both members of a two-member cluster cost the same, so rounding (or another rule for ties) decides where
# such a cluster goes, and runs end in different local optima of nearly the same loss.
MEDOID_TIES = 0.06
OWN_START = 0.10  # a peer with another start must reach the loss within this
CHECKED_IMAGES = 8


@dataclass(frozen=True)
class Settings:
    repeats: int = 11
    sample_s: float = 0.6  # a timed call longer than this is made on fewer images
    problem_s: float = 30.0  # after this no new round of repeats starts (three are always made)
    shortest_s: float = (
        0.02  # shorter calls are repeated inside one sample, so that waking the threads up counts little
    )
    memory: bool = True
    clock: str = "wall"  # or "cpu": process CPU time, meant for one thread on a busy machine


@dataclass
class Provider:
    """Something that does the job. `module` has setup(data) -> call and centers(result, data)."""

    name: str
    module: object
    version: str | None
    objective: str = "same"
    start: str = "given"
    note: str = ""
    backend: str | None = None
    slow_setup: bool = False

    @property
    def is_ours(self) -> bool:
        return self.module is ours

    def setup(self, data):
        return ours.setup(data, self.backend) if self.is_ours else self.module.setup(data)

    def variant(self, data) -> str | None:
        if self.is_ours:
            return ours.variant(data.problem, self.backend)
        return self.module.variant(data) if hasattr(self.module, "variant") else None


def our_provider(backend: str | None) -> Provider:
    return Provider(ours.name(backend), ours, ours.version(), backend=backend, note="tokenpool_ext public function")


def peer_provider(name: str) -> Provider:
    module = peers.load(name)
    return Provider(
        module.NAME,
        module,
        machine.package_version(module.PACKAGE),
        module.OBJECTIVE,
        getattr(module, "START", "given"),
        module.NOTE,
        slow_setup=getattr(module, "SLOW_SETUP", False),
    )


def lloyd64(x, centers, iters: int):
    """Plain float64 Lloyd for the check; empty clusters take the farthest token as contract section 2 says."""
    x, c = x.double(), centers.double()
    K = c.shape[0]
    for _ in range(iters):
        distance = torch.cdist(x, c).square_()
        cost, a = distance.min(1)
        counts = torch.bincount(a, minlength=K)
        for j in (counts == 0).nonzero().flatten().tolist():
            donor = int(torch.where(counts[a] > 1, cost, -1.0).argmax())
            counts[a[donor]] -= 1
            a[donor], counts[j] = j, 1
        c = torch.zeros_like(c).index_add_(0, a, x) / counts[:, None]
    return c


def medoids64(x, init, iters: int):
    x = x.double()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square_()  # exactly symmetric
    medoids, labels = init.clone(), torch.arange(len(init), device=x.device)
    for _ in range(iters):
        a = distance[:, medoids].argmin(1)
        a[medoids] = labels
        hot = torch.nn.functional.one_hot(a, len(init)).double()
        medoids = (distance @ hot).masked_fill_(hot == 0, float("inf")).argmin(0)
    return x[medoids]


def loss(x, centers) -> float:
    """Mean over images of sum_i min_j |x_i - c_j|^2, float64."""
    total = 0.0
    for tokens_of_image, c in zip(x, centers):
        c = torch.as_tensor(c).to(tokens_of_image.device).double()
        total += float(torch.cdist(tokens_of_image.double(), c).square().min(1).values.sum())
    return total / max(1, len(centers))


def reference_loss(data, images: int) -> float | None:
    p = data.problem
    if p.op not in ("kmeans", "kmedoids") or p.N * p.K * p.D * p.iters * images > 6e10:
        return None
    if p.op == "kmeans":
        found = [lloyd64(x, c, p.iters) for x, c in zip(data.x32[:images], data.centers[:images])]
    else:
        found = [medoids64(x, i, p.iters) for x, i in zip(data.x32[:images], data.init[:images])]
    return loss(data.x32[:images], found)


def tolerance(provider: Provider, problem: Problem) -> float:
    """Relative difference of the loss from the reference's up to which the job counts as done."""
    allowed = [TOLERANCE[problem.dtype], getattr(provider.module, "TOLERANCE", 0.0)]
    if provider.start == "own":
        allowed.append(OWN_START)
    if problem.op == "kmedoids":
        allowed.append(MEDOID_TIES)
    return max(allowed)


def check(provider: Provider, result, data, agreed) -> dict:
    """Does the result do the job? -> fields of the record. `agreed` keeps what is computed once a problem."""
    p = data.problem
    if p.op in ("kmeans", "kmedoids"):
        images = min(CHECKED_IMAGES, data.images) if p.N <= 8192 else 1
        found = loss(data.x32[:images], list(provider.module.centers(result, data))[:images])
        if images not in agreed:
            agreed[images] = reference_loss(data, images)
        reference = agreed[images]
        fields = {"loss": found, "loss_images": images, "reference_loss": reference}
        if reference:
            fields["loss_relative"] = found / reference - 1
            fields["tolerance"] = tolerance(provider, p)
            if provider.objective == "same":
                fields["same_loss"] = abs(fields["loss_relative"]) <= fields["tolerance"]
        return fields
    value = provider.module.centers(result, data)[:1].float()
    if agreed.setdefault("value", value) is value:
        return {"same_result": True, "compared_with": "itself (first to finish)"}
    error = float((value - agreed["value"]).abs().max() / agreed["value"].abs().max().clamp(min=1e-30))
    allowed = 1e-3 if p.dtype in ("float32", "float64") else 3e-2
    return {"same_result": error <= allowed, "relative_difference": error, "tolerance": allowed}


def least(call, first: float, settings: Settings, clock) -> float:
    """Least of a few calls (a busy machine makes single ones far too long); one that takes very long is not
    repeated."""
    if first > 20 * settings.sample_s:
        return first
    times = [clock.seconds(call)]
    while len(times) < 5 and sum(times) < settings.sample_s / 2:
        times.append(clock.seconds(call))
    return min(times)


def sized_call(provider: Provider, data, settings: Settings, clock):
    """(call, images, seconds estimated a call, seconds of setup + first call): fewer images when it is slow."""
    began = time.perf_counter()
    # Compiled code is specialised on the batch, so it gets the full batch at once.
    images = data.images if provider.slow_setup or provider.is_ours else min(data.images, 1)
    while True:
        part = data.take(images)
        call = provider.setup(part)
        first = clock.seconds(call)
        setup_s = time.perf_counter() - began
        estimate = least(call, first, settings, clock)
        if images == data.images:
            if estimate > 2 * settings.sample_s and images > 1 and not provider.slow_setup:
                images = max(1, int(images * settings.sample_s / estimate))
                part = data.take(images)
                call = provider.setup(part)
                estimate = least(call, estimate, settings, clock)
            return call, part, estimate, setup_s
        wanted = max(1, min(data.images, int(settings.sample_s / max(estimate / images, 1e-9))))
        if wanted <= images:
            return call, part, estimate, setup_s
        # Batched peers get cheaper an image with the batch: grow in steps, deciding anew.
        images = data.images if estimate / images * data.images <= 2 * settings.sample_s else min(wanted, images * 8)


def input_dtype(problem: Problem, provider: Provider) -> str:
    """What this provider is fed: most peers take float32 only, so a half-precision problem is converted beforehand."""
    native = provider.is_ours or getattr(provider.module, "NATIVE_DTYPE", False) or problem.dtype == "float64"
    native = native or (provider.name == "flash-kmeans" and problem.device == "cuda")
    return problem.dtype if native else "float32"


def base_record(problem: Problem, provider: Provider, context: dict) -> dict:
    return {
        **problem.as_dict(),
        "provider": provider.name,
        "ours": provider.is_ours,
        "input_dtype": input_dtype(problem, provider),
        "objective": provider.objective,
        "start": provider.start,
        "note": provider.note,
        "versions": {**context["versions"], "provider": provider.version},
        **{key: context[key] for key in ("machine", "threads", "commit", "command", "date")},
    }


def run(
    problem: Problem,
    providers: list[Provider],
    settings: Settings,
    context: dict,
    *,
    floors=None,
    skip=None,
    say=lambda text: None,
) -> list[dict]:
    """Time all providers on one problem. `skip`: provider name -> reason known beforehand."""
    data = tokens.make(problem)
    clock = (
        timing.CudaClock()
        if problem.device == "cuda"
        else timing.CpuClock()
        if settings.clock == "cpu"
        else timing.WallClock()
    )
    records, calls, repeats, inner, ready = {}, {}, {}, {}, {}
    agreed: dict = {}
    for provider in providers:
        record = records[provider.name] = {**base_record(problem, provider, context), "tokens_used": data.tokens}
        reason = (skip or {}).get(provider.name)
        if reason:
            record.update(status="skipped", reason=reason)
            continue
        say(f"  setting up {provider.name}")
        try:
            call, part, estimate, setup_s = sized_call(provider, data, settings, clock)
            if settings.memory:
                peak, method, result = timing.peak_extra_bytes(call, problem.device)
            else:
                peak, method, result = None, "not measured", call()
            record.update(
                status="ok",
                variant=provider.variant(part),
                images_timed=part.images,
                setup_and_first_call_s=setup_s,
                peak_extra_bytes=peak,
                memory_method=method,
                **check(provider, result, part, agreed),
            )
            del result
        except Exception as error:
            record.update(status="failed", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
            continue
        calls[provider.name] = call
        ready[provider.name] = part.images
        inner[provider.name] = max(1, min(1000, int(settings.shortest_s / max(estimate, 1e-7))))
        slow = estimate > 4 * settings.sample_s
        repeats[provider.name] = min(settings.repeats, 3) if slow else settings.repeats
    if calls:
        say(f"  timing {len(calls)} providers")
        others = machine.OthersCpu()
        samples, errors = timing.interleave(
            calls, repeats=repeats, clock=clock, calls_per_sample=inner, deadline_s=settings.problem_s
        )
        per_image = {
            name: [None if s is None else s / ready[name] * 1e3 for s in found] for name, found in samples.items()
        }
        finish(records, per_image, errors, inner, "cuda events" if problem.device == "cuda" else settings.clock)
        busy = others.cores()
        for name in calls:
            records[name]["others_cpu_cores"] = busy
    for record in records.values():
        if floors and record["status"] == "ok":
            record.update(floor.over(problem, floors, record["ms_per_image"]))
    return list(records.values())


def finish(records: dict, per_image: dict, errors: dict, inner: dict, clock: str) -> None:
    """Fill times, and the ratios to every provider of ours, round by round (same round, same state of the machine)."""
    for name, found in per_image.items():
        record, times = records[name], [s for s in found if s is not None]
        if name in errors or not times:
            error = errors.get(name)
            record.update(status="failed", reason=f"while timing: {type(error).__name__}: {error}")
            continue
        record.update(
            ms_per_image=timing.percentiles(times),
            repeats=len(times),
            calls_per_sample=inner[name],
            clock=clock,
            samples_ms_per_image=[round(t, 6) for t in times],
        )
    us = next((name for name, r in records.items() if r["ours"] and r["status"] == "ok"), None)
    for name, record in records.items():
        if us and record["status"] == "ok":
            ratios = timing.paired_ratios(per_image[name], per_image[us])
            if ratios:
                record["time_over_ours"] = timing.percentiles(ratios)
