"""Long calls hear Ctrl-C, and a thread of the pool that finds no memory says so."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

import tokenpool_ext as tp
from tokenpool_ext import loader

pytestmark = pytest.mark.skipif(loader.extension is None, reason=str(loader.ops_reason))


def interrupted(call):
    """Seconds from Ctrl-C, 0.3 s into the call, until KeyboardInterrupt."""
    sent = []

    def press():
        time.sleep(0.3)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    # A shell starts what runs in the background deaf to Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
        return time.perf_counter() - sent[0]
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_of_many_images_is_interrupted(threads, count):
    threads(count)
    image = torch.randn(196, 64)
    assert interrupted(lambda: tp.kmeans(image.expand(100_000, 196, 64), 2, num_iters=100, backend="cpu")) < 5
    assert tp.kmeans(image, 5).centers.isfinite().all(), "usable afterwards"


@pytest.mark.parametrize("path", ["gram", "direct"])
def test_one_large_image_is_interrupted(path, monkeypatch):
    monkeypatch.setenv("TOKENPOOL_EXT_CPU_PATH", path)
    x = torch.randn(400, 2000, 8) if path == "gram" else torch.randn(40_000, 64)
    k = 1000 if path == "gram" else 4000
    assert interrupted(lambda: tp.kmeans(x, k, num_iters=2**31 - 1, backend="cpu")) < 5
    assert tp.kmeans(torch.randn(64, 8), 5).centers.isfinite().all(), "usable afterwards"


def test_the_handler_of_a_signal_may_raise_what_it_likes():
    class Enough(Exception):
        pass

    def handler(*_):
        raise Enough

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(Enough):
            tp.kmeans(torch.randn(40_000, 64), 4000, num_iters=1000, backend="cpu")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS")
def test_memory_that_a_thread_does_not_get_is_named():
    script = textwrap.dedent("""
        import os, resource, torch, tokenpool_ext as tp
        torch.set_num_threads(2)
        x = torch.randn(2, 12000, 8)
        tp.kmeans(x[:, :50], 4)  # the pool has its threads
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), resource.RLIM_INFINITY))
        try:
            tp.kmeans(x, 4)
        except RuntimeError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        print(tp.kmeans(x[:, :50], 4).centers.isfinite().all().item())
    """)
    environment = {**os.environ, "TOKENPOOL_EXT_CPU_PATH": "gram", "OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "tried to allocate 576" in run.stdout, run.stdout + run.stderr  # 12000 x 12000 floats: 576 MB
    assert "True" in run.stdout


@pytest.mark.parametrize("name,value", [("TOKENPOOL_EXT_CPU_ISA", "neon9"), ("TOKENPOOL_EXT_CPU_PATH", "fast")])
def test_a_wrong_environment_variable_is_a_value_error(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        tp.kmeans(torch.randn(4, 2), 2, backend="cpu")
