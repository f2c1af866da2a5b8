"""The benchmark harness itself: clocks, records, reasons, tables, the figure. Small and without the peers' packages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import (
    call_cost,
    crossover,
    floor,
    machine,
    peers,
    plot,
    profile_cpu,
    report,
    runner,
    timing,
    tokens,
)
from bench.__main__ import main
from bench.problem import Problem, parse_shapes, problems

TINY = Problem("kmeans", B=2, N=24, D=8, K=4, iters=3, label="tiny")
QUICK = runner.Settings(repeats=3, sample_s=0.01, problem_s=2.0, shortest_s=0.0)
REQUIRED = {
    "op",
    "shape",
    "B",
    "N",
    "D",
    "K",
    "iters",
    "dtype",
    "mode",
    "device",
    "tokens",
    "tokens_used",
    "provider",
    "ours",
    "objective",
    "versions",
    "machine",
    "threads",
    "commit",
    "command",
    "date",
    "status",
}
MEASURED = {
    "ms_per_image",
    "samples_ms_per_image",
    "repeats",
    "calls_per_sample",
    "images_timed",
    "peak_extra_bytes",
    "memory_method",
    "setup_and_first_call_s",
    "loss",
    "same_loss",
    "tolerance",
}


class CountingClock:
    """Time advances by one unit a call, so that times are known; remembers who was timed when."""

    def __init__(self):
        self.order = []

    def seconds(self, call, calls=1):
        self.order.append(call.__name__)
        call()
        return float(len(self.order))


def named(name, action=lambda: None):
    def call():
        return action()

    call.__name__ = name
    return call


def context():
    return {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "threads": 1,
        "commit": machine.commit(),
        "command": "python -m bench",
        "date": machine.now(),
    }


def fake_peer(name="fake", objective="same", setup=None, shift=0.0):
    """A correct (shift=0) or wrong (shift>0) K-Means provider made of the harness's own reference."""

    def right(data):
        return lambda: [runner.lloyd64(x, c, data.problem.iters) + shift for x, c in zip(data.x32, data.centers)]

    module = types.SimpleNamespace(setup=setup or right, centers=lambda result, data: result)
    return runner.Provider(name, module, "1.0", objective)


# ---- clocks


@pytest.mark.parametrize("q, expected", [(0, 1.0), (20, 1.8), (50, 3.0), (80, 4.2), (100, 5.0)])
def test_percentile_interpolates(q, expected):
    assert timing.percentile([5, 3, 1, 2, 4], q) == pytest.approx(expected)


def test_percentile_of_one_value_and_of_none():
    assert timing.percentiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}
    with pytest.raises(ValueError):
        timing.percentile([], 50)


def test_repeats_are_interleaved_in_rotating_order():
    clock = CountingClock()
    samples, errors = timing.interleave({n: named(n) for n in "abc"}, repeats=3, clock=clock, pause=0)
    assert clock.order == list("abcbcacab")
    assert samples == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]} and not errors


def test_fewer_rounds_for_a_slow_provider_keep_rounds_aligned():
    samples, _ = timing.interleave(
        {n: named(n) for n in "ab"}, repeats={"a": 4, "b": 2}, clock=CountingClock(), pause=0
    )
    assert [s is None for s in samples["b"]] == [False, False, True, True]
    assert len(timing.paired_ratios(samples["b"], samples["a"])) == 2


def test_a_provider_that_raises_is_dropped_and_the_others_go_on():
    def fail():
        raise RuntimeError("out of luck")

    clock = CountingClock()
    samples, errors = timing.interleave(
        {"good": named("good"), "bad": named("bad", fail)}, repeats=3, clock=clock, pause=0
    )
    assert len([s for s in samples["good"] if s]) == 3
    assert str(errors["bad"]) == "out of luck" and clock.order.count("bad") == 1


def test_deadline_still_makes_three_rounds():
    samples, _ = timing.interleave({"a": named("a")}, repeats=9, clock=CountingClock(), pause=0, deadline_s=0.0)
    assert len(samples["a"]) == 3


def test_wall_clock_divides_by_calls():
    times = iter([0.0, 1.0])
    assert timing.WallClock(lambda: next(times)).seconds(lambda: None, calls=4) == 0.25


def test_peak_memory_sees_an_allocation_that_is_freed_again():
    peak, method, _ = timing.peak_extra_bytes(lambda: torch.ones(16 << 20, dtype=torch.uint8).sum())
    if peak is None:
        pytest.skip(method)
    assert peak >= 15 << 20


# ---- what is measured


def test_shapes_are_parsed_and_labelled():
    assert parse_shapes("256x384:128, 7x5:3") == [("DINOv2-S", 256, 384, 128), ("", 7, 5, 3)]
    with pytest.raises(ValueError, match="NxD:K"):
        parse_shapes("256-384")


def test_problems_left_out_are_named():
    found, left_out = problems(suite="long", batches=[1, 256], ops=["kmeans", "kmedoids"])
    assert any(p.N == 75600 and p.B == 1 for p in found)
    assert any("GiB" in text for text in left_out) and any("N x N" in text for text in left_out)


def test_wrong_problems_are_refused():
    with pytest.raises(ValueError, match="K must be <= N"):
        Problem("kmeans", 1, 4, 4, 5)
    with pytest.raises(ValueError, match="op must be one of"):
        Problem("dbscan", 1, 4, 4, 2)


def test_derived_tokens_have_the_shape_and_say_the_recipe():
    base = torch.randn(3, 256, 384, generator=torch.Generator().manual_seed(0))
    same, words = tokens.derive(base, 2, 256, 384)
    assert torch.equal(same, base[:2]) and words == "real"
    other, words = tokens.derive(base, 4, 196, 192)
    assert other.shape == (4, 196, 192) and "bilinear" in words and "orthonormal" in words and "noise" in words
    assert torch.equal(other, tokens.derive(base, 4, 196, 192)[0])
    assert not torch.equal(other[0], other[3]), "a repeated image gets fresh noise"


def test_missing_real_tokens_are_recorded(monkeypatch):
    monkeypatch.setattr(tokens, "_base", {"base": (None, "no network")})
    data = tokens.make(Problem("kmeans", 2, 24, 8, 4, tokens="real"))
    assert data.tokens.startswith("random") and "no network" in data.tokens


def test_initial_tokens_are_distinct():
    indices = tokens.distinct_indices(5, 12, 12)
    assert all(sorted(row.tolist()) == list(range(12)) for row in indices)


# ---- peers


@pytest.mark.parametrize("name", peers.NAMES)
def test_every_peer_has_the_interface(name):
    peer = peers.load(name)
    assert {"NAME", "PACKAGE", "OPS", "DEVICES", "OBJECTIVE", "NOTE"} <= set(vars(peer))
    assert callable(peer.setup) and callable(peer.centers) and callable(peer.unavailable)
    assert peer.OBJECTIVE in ("same", "other")


def test_peers_are_selected_by_either_name():
    assert peers.select("scikit-learn,torch eager,faiss_cpu") == ["scikit_learn", "torch_eager", "faiss_cpu"]
    assert peers.select("none") == [] and len(peers.select("all")) == len(peers.NAMES)
    with pytest.raises(ValueError, match="unknown peer"):
        peers.load("nonesuch")


def test_a_peer_that_is_not_installed_gives_the_reason(monkeypatch):
    monkeypatch.setattr(peers, "package_version", lambda name: None)
    assert "not installed" in peers.why_not(peers.load("scikit_learn"), TINY)


@pytest.mark.parametrize(
    "name",
    [
        "torch_eager",
        "torch_eager_gram",
        "scikit_learn",
        "faiss_cpu",
        "fastkmeans",
        "flash_kmeans",
        "fast_pytorch_kmeans",
    ],
)
def test_exact_peers_reach_the_reference_loss(name):
    peer = peers.load(name)
    reason = peers.why_not(peer, TINY)
    if reason:
        pytest.skip(reason)
    data = tokens.make(TINY)
    found = runner.loss(data.x32, peer.centers(peer.setup(data)(), data))
    assert found == pytest.approx(runner.reference_loss(data, data.images), rel=1e-4)


@pytest.mark.parametrize("name", ["torch_eager", "cluster_loop", "kmedoids_alternating"])
def test_exact_medoid_peers_reach_the_reference_loss(name):
    problem = Problem("kmedoids", B=2, N=24, D=8, K=4, iters=3)
    peer = peers.load(name)
    reason = peers.why_not(peer, problem)
    if reason:
        pytest.skip(reason)
    data = tokens.make(problem)
    found = runner.loss(data.x32, peer.centers(peer.setup(data)(), data))
    assert found == pytest.approx(runner.reference_loss(data, data.images), rel=1e-4)


def test_bipartite_merging_keeps_the_mean_and_the_count():
    from bench.peers import bipartite

    x = torch.randn(3, 11, 5, generator=torch.Generator().manual_seed(0))
    merged, size = bipartite.merge(x, torch.ones(3, 11, 1), *bipartite.match(x, 4))
    assert merged.shape == (3, 7, 5) and torch.equal(size.sum(1), torch.full((3, 1), 11.0))
    torch.testing.assert_close((merged * size).sum(1), x.sum(1))
    assert "half" in bipartite.unavailable(Problem("kmeans", 1, 10, 4, 4))


# ---- records


def test_records_have_every_field():
    records = runner.run(TINY, [fake_peer()], QUICK, context())
    assert len(records) == 1 and records[0]["status"] == "ok"
    assert REQUIRED | MEASURED <= set(records[0])
    assert set(records[0]["ms_per_image"]) == {"p20", "p50", "p80"} and records[0]["same_loss"]
    assert {"python", "torch", "provider"} <= set(records[0]["versions"])
    assert {"avx2", "avx512f", "cpu"} <= set(records[0]["machine"])
    json.dumps(records)


def test_failing_and_skipped_peers_are_recorded_with_the_reason():
    def broken(data):
        raise ImportError("no module named nothing")

    records = runner.run(
        TINY,
        [fake_peer(), fake_peer("broken", setup=broken), fake_peer("absent")],
        QUICK,
        context(),
        skip={"absent": "absent is not installed"},
    )
    by_name = {r["provider"]: r for r in records}
    assert by_name["broken"]["status"] == "failed" and by_name["broken"]["reason"].startswith("ImportError: no module")
    assert by_name["absent"]["status"] == "skipped" and "not installed" in by_name["absent"]["reason"]
    text = report.table(records)
    assert "broken: failed, ImportError" in text and "absent: skipped, absent is not installed" in text


def test_a_peer_that_does_another_job_is_marked_and_never_the_best():
    records = runner.run(TINY, [fake_peer("right"), fake_peer("wrong", shift=1.0)], QUICK, context())
    by_name = {r["provider"]: r for r in records}
    assert by_name["right"]["same_loss"] and not by_name["wrong"]["same_loss"]
    by_name["wrong"]["ms_per_image"] = {"p20": 0.0, "p50": 0.0, "p80": 0.0}
    assert report.best_peer(records)["provider"] == "right" and "DIFFERS" in report.table(records)


def test_slow_peers_are_timed_on_fewer_images():
    import time

    def slow(data):
        def call():
            time.sleep(0.03 * data.images)
            return [runner.lloyd64(x, c, 1) for x, c in zip(data.x32, data.centers)]

        return call

    problem = Problem("kmeans", B=6, N=12, D=4, K=3, iters=1)
    (record,) = runner.run(problem, [fake_peer(setup=slow)], QUICK, context())
    assert record["images_timed"] < 6 and 25 < record["ms_per_image"]["p50"] < 120
    assert "timed on" in report.table([record])


def made_up(provider, p50, ours=False, shape=(256, 384, 128), **more):
    N, D, K = shape
    ms = {"p20": p50 * 0.9, "p50": p50, "p80": p50 * 1.2}
    return {
        **Problem("kmeans", 64, N, D, K).as_dict(),
        "provider": provider,
        "ours": ours,
        "objective": "same",
        "versions": {"provider": "1"},
        "machine": {"cpu": "a cpu"},
        "threads": 2,
        "commit": "abc",
        "status": "ok",
        "images_timed": 64,
        "ms_per_image": ms,
        "time_over_ours": ms,
        "time_over_floor": ms,
        "same_loss": True,
        "loss_relative": 0.0,
        **more,
    }


def two_shapes():
    return [
        record
        for shape in ((256, 384, 128), (196, 192, 98))
        for record in (
            made_up("tokenpool_ext", 1.0, True, shape),
            made_up("peer", 4.0, shape=shape),
            made_up("other", 2.0, shape=shape, objective="other"),
        )
    ]


def test_summary_compares_with_the_best_peer_of_the_same_objective():
    text = report.summary(two_shapes())
    assert "4.00x [3.60, 4.80] over peer" in text and "geometric mean of 2 shapes" in text and "over other" not in text


def test_plotter_makes_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"schema": 1, "records": two_shapes()}))
    assert plot.main([str(result)]) == 0
    assert (tmp_path / "result.png").read_bytes()[:4] == b"\x89PNG"


def test_plotter_says_when_there_is_nothing_to_draw(tmp_path, capsys):
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"schema": 1, "records": []}))
    assert plot.main([str(result)]) == 2
    assert "no record" in capsys.readouterr().err


# ---- floor

RATES = {
    "device": "cpu",
    "fma_float32_gflops": 100.0,
    "fma_float64_gflops": 50.0,
    "gemm_bfloat16_gflops": 1.0,
    "copy_gbytes": 10.0,
}


def test_floor_takes_the_cheaper_path_and_the_larger_bound():
    gram = floor.work(Problem("kmeans", 1, 256, 384, 128))
    assert gram["path"] == "gram" and gram["flops"] == 256 * 256 * 384
    direct = floor.work(Problem("kmeans", 1, 4096, 320, 16))
    assert direct["path"] == "direct" and direct["flops"] == 2 * 4096 * 320 * 16
    fields = floor.over(Problem("kmeans", 1, 256, 384, 128), RATES, {"p50": 1.0})
    assert fields["floor_bound_by"] == "flops"
    assert fields["floor_ms_per_image"] == pytest.approx(256 * 256 * 384 / 100e9 * 1e3)
    assert floor.over(Problem("pool_backward", 1, 256, 384, 128), RATES, {"p50": 1.0})["floor_bound_by"] == "bytes"


def test_floor_of_bfloat16_is_the_float32_loop_without_own_instructions():
    assert floor.peak_gflops(RATES, "bfloat16") == (100.0, "multiply-add loop, float32")
    assert floor.peak_gflops(RATES, "float64")[0] == 50.0


def test_compiler_flags_follow_the_processor():
    assert floor.compiler_flags({"avx2", "fma"}) == ["-mavx2", "-mfma"]
    assert "-mavx512f" in floor.compiler_flags({"avx2", "fma", "avx512f"}) and floor.compiler_flags(set()) == []


# ---- command line


def test_command_line_writes_the_records(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(runner, "Settings", lambda memory, clock, **times: replace(QUICK, memory=memory, clock=clock))
    threads = torch.get_num_threads()
    out = tmp_path / "out.json"
    try:
        assert (
            main(
                [
                    "--shapes",
                    "24x8:4",
                    "--batch",
                    "2",
                    "--peers",
                    "torch eager,scikit-learn",
                    "--tokens",
                    "random",
                    "--quick",
                    "--iters",
                    "2",
                    "--json",
                    str(out),
                ]
            )
            == 0
        )
    finally:
        torch.set_num_threads(threads)
    content = json.loads(out.read_text())
    assert content["schema"] == 1 and {"command", "date", "commit", "machine", "settings"} <= set(content)
    assert {r["provider"] for r in content["records"]} == {"tokenpool_ext", "torch eager", "scikit-learn"}
    assert "ms/image" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("g++") is None or not machine.machine()["avx2"], reason="needs g++ and AVX2")
@pytest.mark.parametrize("isa", list(profile_cpu.COPIES))
def test_the_profile_follows_the_kernels(isa, capfd, monkeypatch):
    """It calls the kernels' phases by name; here with starting tokens enough to be multiplied once."""
    if isa not in profile_cpu.copies():
        pytest.skip("this processor has no AVX-512 with VNNI")
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_ISA", isa)
    monkeypatch.setattr(profile_cpu, "OPTIMISED", "-O0")  # no time is looked at
    assert profile_cpu.main(["100", "16", "80", "1"]) == 0
    told = capfd.readouterr().out
    assert told.startswith(isa) and "direct path" in told and "first update" in told


def fitted(told: str, name: str) -> float:
    return float(re.search(rf"\b{name}\s*=\s*([0-9.]+)", told)[1])


def test_constants_are_fitted_to_records_made_elsewhere(tmp_path, capsys):
    """Times made by known constants give these constants again, from two machines of which one is slower."""
    true = [0.02, 0.7, 0.1, 0.012, 0.35, 0.4, 70, 0.5]
    for name, slower in (("one", 1.0), ("two", 1.6)):
        rows = {kind: [] for kind in crossover.KINDS}
        for kind, op in crossover.KINDS.items():
            for N, D, K, T in crossover.grid(quick=False):
                row = dict(op=op, N=N, D=D, K=K, T=T)
                for path in crossover.PATHS:
                    row[f"{path}_ns"] = slower * crossover.tell_time(true, path, row)
                rows[kind].append(row)
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    assert crossover.main(["--fit", str(tmp_path / "one.json"), str(tmp_path / "two.json")]) == 0
    told = capsys.readouterr().out
    ratios = [fitted(told, name) / value for name, value in zip(crossover.NAMES[:-1], true)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=0.02)
    assert told.count("mean time lost 0.0%") == 6
    scales = [float(word) for word in told.splitlines()[1].replace(",", "").split() if word[0].isdigit()]
    assert scales[1] / scales[0] == pytest.approx(1.6, rel=0.02)


def test_the_planner_holds_the_constants_of_the_records(capsys):
    """csrc/planner.cpp says what `crossover --fit` prints for the records in the repository."""
    root = Path(crossover.__file__).parent.parent
    assert crossover.main(["--fit", *map(str, sorted(root.glob("bench/results/crossover-*.json")))]) == 0
    told, source = capsys.readouterr().out, (root / "csrc/planner.cpp").read_text()
    for name in crossover.NAMES:
        assert fitted(source, name) == pytest.approx(fitted(told, name), rel=0.01), name


def test_a_record_says_what_was_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["crossover.py", "--quick"])
    for name in ("TOKENPOOL_EXT_CPU_PATH", "TOKENPOOL_EXT_CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_ISA", "avx2")
    assert machine.command("bench.crossover") == "TOKENPOOL_EXT_CPU_ISA=avx2 python -m bench.crossover --quick"


def test_what_a_call_costs_is_measured():
    found = call_cost.measure("cpu", rounds=2, count=2)
    assert {"kmeans, strided", "TokenPooling", "torch.empty"} < set(found)
    assert all(0 < us["p20"] <= us["p50"] <= us["p80"] for us in found.values())


@pytest.mark.skipif(shutil.which("bash", path="/usr/bin:/bin") is None, reason="no bash")
def test_gpu_script_runs_every_stage_and_writes_few_files(tmp_path):
    """With an interpreter that only says what it is asked: stages, records and the exit status, without a GPU."""
    asked, fails = tmp_path / "asked", "bench.gpu_checks parity --backend cuda"
    python = tmp_path / "python"
    python.write_text(f"""#!/usr/bin/env bash
echo "$*" >>{asked}
case "$*" in *get_device_capability*) echo 9.0 ;; *get_device_name*) echo a GPU ;; *"{fails}"*) echo broken; exit 7 ;;
esac
while [ $# -gt 0 ]; do if [ "$1" = --json ]; then echo "{{}}" >"$2"; fi; shift; done
""")
    python.chmod(0o755)
    out, path = tmp_path / "out", f"{tmp_path}:/usr/bin:/bin"
    for tool in ("compute-sanitizer", "ncu"):
        (tmp_path / tool).write_text("#!/usr/bin/env bash\nif [ $1 = --help ]; then echo --kernel-regex; fi\n")
        (tmp_path / tool).chmod(0o755)
    environment = {"OUT": str(out), "PYTHON": str(python), "PATH": path}
    done = subprocess.run(
        ["bash", str(machine.ROOT / "bench" / "gpu.sh")], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stdout + done.stderr
    summary = json.loads((out / "gpu_summary.json").read_text())
    status = {stage["stage"]: stage["status"] for stage in summary["stages"]}
    assert status.pop("parity") == 7 and summary["failed"] == 1 and summary["device"] == "a GPU"
    assert set(status.values()) == {0}
    assert {
        "build",
        "info",
        "speed",
        "invariants",
        "sanitizers",
        "tests_cuda",
        "tests_triton",
        "bench_kmeans",
        "bench_long",
        "ncu",
    } < set(status)
    assert list(status).index("bench_kmeans") < list(status).index("tests_cuda")
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert f"{tool}: passed" in (out / "gpu.log").read_text()
    assert "setup.py build_ext --inplace" in asked.read_text()
    assert "broken" in (out / "gpu.log").read_text()
    files = {
        "gpu.log",
        *(f"gpu_{name}.json" for name in ("summary", "checks", "kmeans", "small_batch", "long", "triton")),
    }
    assert {file.name for file in out.iterdir()} == files
    assert "second call" not in done.stdout

    environment["LIMIT"] = "0"
    done = subprocess.run(
        ["bash", str(machine.ROOT / "bench" / "gpu.sh")], env=environment, capture_output=True, text=True, timeout=60
    )
    assert 'STAGES="build environment build info parity' in done.stdout and done.returncode > 5


def test_records_are_written_one_a_line(tmp_path):
    content = {"machine": {"cpu": "x", "cores": 2}, "empty": [], "rows": {"real": [{"N": 1}, {"N": 2}]}, "b": [1, 2]}
    machine.write(tmp_path / "new" / "record.json", content)
    text = (tmp_path / "new" / "record.json").read_text()
    assert json.loads(text) == content and '\n{"N": 2}\n' in text and len(text.splitlines()) == 11
