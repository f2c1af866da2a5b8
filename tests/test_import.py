"""What an import loads, and what it costs beside torch's own."""

import subprocess
import sys

CODE = """
import sys, time, torch
before, begun = set(sys.modules), time.process_time()
import tokenpool_ext
took = time.process_time() - begun
ours = {name.removeprefix("tokenpool_ext.") for name in sys.modules if name.startswith("tokenpool_ext.")}
import tokenpool_ext.retrieval, tokenpool_ext.triton as t
t.kmeans
others = {name for name in set(sys.modules) - before if not name.startswith("tokenpool_ext")}
print(took, sorted(name for name in others if name.split(".")[0] not in sys.stdlib_module_names))
print(*ours)
"""
# Not before they are used: programs, what optional packages need, and kernels that Triton compiles.
LATER = {"demo", "doctor", "bench_model", "models", "viz", "retrieval", "triton.launch", "triton.device"}


def test_an_import_loads_only_this_package_and_the_standard_library():
    """No optional dependency, and no further module of torch: it cannot become slow with another torch."""
    for _ in range(3):  # a busy machine may take long once
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        first, ours = done.stdout.splitlines()
        took, others = first.split(" ", 1)
        assert others == "[]" and not LATER & set(ours.split()), done.stdout
        if float(took) < 0.3:
            return
    raise AssertionError(f"{took} s of CPU")
