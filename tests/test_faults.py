"""What happens around a call goes wrong, or goes on for long: processes, threads, memory."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import tokenpool_ext as tp
from tokenpool_ext import loader

pytestmark = [
    pytest.mark.skipif(loader.extension is None, reason=str(loader.ops_reason)),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and fork"),
]


def run(script, seconds=300):
    """What a process of its own prints; two threads, as a pool of one thread is none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_workers_of_a_data_loader_started_after_the_first_call():
    """Forked workers have no pool of threads; torch gives each one thread, which needs none."""
    run("""
        import torch, tokenpool_ext as tp
        from torch.utils.data import DataLoader

        class Images:
            def __len__(self): return 6
            def __getitem__(self, i):
                return tp.kmeans(torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(i)), 5).centers

        here = [Images()[i] for i in range(6)]
        workers = DataLoader(Images(), batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert all(torch.equal(a, b) for a, b in zip(here, workers))
        assert torch.equal(here[0], Images()[0])
    """)


def test_a_fork_with_one_thread_may_call():
    """docs/backends.md: of a bare fork torch's pool of threads does not survive, but one thread needs none."""
    said = run("""
        import os, torch, tokenpool_ext as tp
        x = torch.randn(4, 50, 8)
        tp.kmeans(x, 5)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(0 if tp.kmeans(x, 5).centers.isfinite().all() else 1)
        print(os.waitpid(child, 0)[1])
    """)
    assert said.strip() == "0"


def test_eight_threads_get_what_one_gets():
    inputs = [torch.randn(2, 60 + i, 16, generator=torch.Generator().manual_seed(i)) for i in range(40)]

    def work(x):
        found = tp.kmeans(x, 9, weights=x[..., 0].abs(), init="topk")
        q = x.view(2, 1, -1, 16)
        return (*found, tp.pool(x, found.assignment, 9), tp.attention_received(q, q), tp.kmedoids(x, 9).centers)

    alone = [work(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, inputs * 4))
    for one, other in zip(alone * 4, together):
        assert all(torch.equal(a, b) for a, b in zip(one, other) if a is not None)


def test_memory_is_flat_over_ten_thousand_calls(threads):
    """From the 2,000th to the 12,000th, the last in threads of their own; several shapes, gradients, refusals."""
    threads(1)
    images = [torch.randn(2, n, 8, requires_grad=n == 20) for n in (12, 20, 33, 50)]
    weights = [x.detach()[..., 0].abs() for x in images]

    def used():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def calls(count):
        for i in range(count):
            x = images[i % 4]
            found = (tp.kmeans, tp.kmedoids)[i // 4 % 2](x, 4, weights=weights[i % 4], num_iters=2)
            if i % 20 == 1:
                found.centers.sum().backward()
                with pytest.raises(ValueError):
                    tp.kmeans(x, 1000)

    calls(2000)
    before = used()
    calls(9600)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(calls, [50] * 8))
    assert used() - before < 16 << 20, f"{(used() - before) >> 20} MiB more"


def test_a_result_that_does_not_fit_raises_the_error_of_torch():
    """With the bytes that were asked for, on both backends; what was there before is whole."""
    said = run("""
        import os, resource, torch, tokenpool_ext as tp
        centers, labels = torch.ones(1, 1, 1 << 20), torch.zeros(1, 1 << 16, dtype=torch.int64)
        tp.unpool(centers, labels[:, :2])
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
        for name in ("cpu", "reference"):
            try:
                tp.unpool(centers, labels, backend=name)
            except RuntimeError as error:
                print(type(error).__name__, str(error).replace("\\n", " "))
            print(tp.unpool(centers, labels[:, :2], backend=name).sum().item())
    """)
    refusals, sums = said.splitlines()[::2], said.splitlines()[1::2]
    assert all(r.startswith("RuntimeError") and "allocate 274877906944 bytes" in r for r in refusals), said
    assert sums == ["2097152.0"] * 2
