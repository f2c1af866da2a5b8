#!/usr/bin/env bash
# Everything there is to learn from one visit to a GPU, in one call, under nine minutes:
#   build for the present architecture, parity with the float64 reference, the benchmark with peers, a profile of the main
#   kernels, four compute-sanitizer tools, the test suite, determinism, CUDA graphs, host synchronisation; then Triton.
# What matters most comes first; stages for which there was no time are named at the end, for a second call.
#
#   bash bench/gpu.sh                  results into bench/results/ (bench/.cache holds the real tokens: bring it along)
#   OUT=dir PYTHON=python3 bash bench/gpu.sh
#   STAGES="build tests_cuda speed" bash bench/gpu.sh    only these, as for what a first call had no time left for
# In a copy without its history a file COMMIT beside the README names the commit in the records: git rev-parse HEAD > COMMIT
#
# Every stage has a time limit; a failing one is recorded and the next one runs. All they print is in gpu.log, its end on
# the terminal: seven files in all, for a place that hands back no more. The exit status is the number of failed stages
# that must pass (build, parity, tests, invariants, sanitizers), those without time among them.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 99

OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-530} # seconds for the whole script
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/gpu.log
PART=$(mktemp)
COMMIT=$(git rev-parse HEAD 2>/dev/null || cat COMMIT 2>/dev/null || echo unknown)
SUMMARY=$OUT/gpu_summary.json
CHECKS=$OUT/gpu_checks.json # of all its runs
export PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -z "${STAGES:-}" ]; then # a second call adds to what the first one wrote
  rm -f "$CHECKS"
  : >"$LOG"
else
  SUMMARY=$OUT/gpu_summary_stages.json
fi

START=$SECONDS
FAILED=0
RECORDS=""
LEFT="" # stages without time

say() { printf '%s\n' "$*" | tee -a "$LOG"; }

# stage NAME REQUIRED(1|0) SECONDS COMMAND...
stage() {
  local name=$1 required=$2 limit=$3 left begin status
  shift 3
  if [ -n "${STAGES:-}" ] && [[ " $STAGES " != *" $name "* ]]; then return 0; fi
  left=$((LIMIT - (SECONDS - START)))
  if [ "$left" -lt 15 ]; then
    say "== $name: skipped, no time left"
    LEFT="$LEFT $name"
    RECORDS="$RECORDS{\"stage\": \"$name\", \"status\": \"skipped\", \"seconds\": 0},"
    if [ "$required" = 1 ]; then FAILED=$((FAILED + 1)); fi
    return 0
  fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  begin=$SECONDS
  say "== $name (at most $limit s): $*"
  STAGE_LIMIT=$limit timeout --kill-after=10 "$limit" "$@" >"$PART" 2>&1
  status=$?
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then LEFT="$LEFT $name"; fi
  cat "$PART" >>"$LOG"
  tail -n 12 "$PART"
  : >"$PART"
  say "== $name: status $status after $((SECONDS - begin)) s"
  RECORDS="$RECORDS{\"stage\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - begin))},"
  if [ "$status" -ne 0 ] && [ "$required" = 1 ]; then FAILED=$((FAILED + 1)); fi
  return 0
}

# shellcheck disable=SC2329 # called by the trap
finish() {
  local device
  cat "$PART" >>"$LOG" # of a stage that was under way
  rm -f "$PART"
  device=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name())" 2>/dev/null || echo unknown)
  printf '{"device": "%s", "commit": "%s", "date": "%s", "command": "bash bench/gpu.sh", "failed": %d, "stages": [%s]}\n' \
    "$device" "$COMMIT" "$(date -u +%FT%TZ)" "$FAILED" "${RECORDS%,}" >"$SUMMARY"
  if [ -n "$LEFT" ]; then say "== out of time; for a second call: STAGES=\"build$LEFT\" bash bench/gpu.sh"; fi
  say "== $FAILED required stage(s) failed; $((SECONDS - START)) s; $SUMMARY"
}
trap finish EXIT

if ! CAPABILITY=$("$PYTHON" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())" 2>>"$LOG"); then
  say "no CUDA device that torch can use: nothing to do"
  FAILED=1
  exit 1
fi

# The present architecture alone, so that the build takes a fraction of the release's.
ARCH=$CAPABILITY
case $CAPABILITY in 9.0 | 10.0 | 12.0) ARCH=${CAPABILITY}a ;; esac
export TORCH_CUDA_ARCH_LIST=$ARCH
export TOKENPOOL_EXT_CUDA=1
export PIP_RETRIES=0 PIP_DEFAULT_TIMEOUT=2 # without bench/.cache the real tokens are asked for: in vain where there is no network
MAX_JOBS=${MAX_JOBS:-$(nproc)}
export MAX_JOBS

# What the later stages can use: peers and real tokens that are missing make tables with holes.
# shellcheck disable=SC2016 # the inner shell expands $0
stage environment 0 20 bash -c 'nvidia-smi; nvcc --version; "$0" - <<EOF
import importlib.util, pathlib, torch
print(torch.__version__, torch.version.cuda, torch.cuda.get_device_properties(0))
for name in ("flash_kmeans", "triton", "xdist", "hypothesis", "numpy", "ninja", "setuptools"):
    print("PACKAGE", name, "here" if importlib.util.find_spec(name) else "MISSING")
print("REAL TOKENS", "here" if list(pathlib.Path("bench/.cache").glob("real_*.pt")) else "MISSING: they will be random")
EOF' "$PYTHON"
# An older setuptools cannot read pyproject.toml (PEP 639), which this command does not need.
# shellcheck disable=SC2016
stage build 1 170 bash -c '
  if ! "$0" -c "import setuptools; assert int(setuptools.__version__.split(\".\")[0]) >= 77"; then
    trap "mv pyproject.aside pyproject.toml" EXIT
    mv pyproject.toml pyproject.aside
  fi
  "$0" setup.py build_ext --inplace' "$PYTHON"
stage info 0 30 "$PYTHON" -m tokenpool_ext info
stage parity 1 80 "$PYTHON" -m bench.gpu_checks parity --backend cuda --json "$CHECKS"
# The figures that matter most, before what takes longest.
CORES=(--threads "$(nproc)") # tokens are made on the CPU
stage bench_small 0 35 "$PYTHON" -m bench --shapes 196x384:98 --device cuda "${CORES[@]}" --dtype bfloat16 --batch 1,8,256 \
  --op kmeans,kmedoids --peers bipartite --backend cuda --repeats 7 --json "$OUT/gpu_small_batch.json"
stage speed 0 45 "$PYTHON" -m bench.gpu_checks speed --backend cuda --json "$CHECKS"
stage bench_kmeans 0 110 "$PYTHON" -m bench --suite vit --device cuda "${CORES[@]}" --backend cuda --dtype bfloat16 --batch 256 \
  --peers torch_eager,flash_kmeans,bipartite --repeats 7 --floor --json "$OUT/gpu_kmeans.json"
stage bench_long 0 50 "$PYTHON" -m bench --shapes 75600x128:1000 --device cuda "${CORES[@]}" --dtype bfloat16 --batch 32 \
  --peers flash_kmeans --backend cuda --repeats 5 --json "$OUT/gpu_long.json"
NCU=$(command -v ncu || ls /usr/local/cuda/bin/ncu 2>/dev/null || true)
if [ -n "$NCU" ]; then # the card's clocks stay as they are
  stage ncu 0 40 "$NCU" --clock-control none --kernel-name 'regex:resident_kernel|spread|means_kernel' --launch-skip 2 \
    --launch-count 6 --set full "$PYTHON" -m bench.gpu_checks profile
fi

SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
# Only this project's kernels: torch's own make initcheck report what is none of our business.
FILTER=()
if [ -n "$SANITIZER" ]; then
  HELP=$("$SANITIZER" --help 2>&1 || true)
  if grep -q -- --kernel-regex <<<"$HELP"; then
    FILTER=(--kernel-regex kns=tokenpool)
  elif grep -q -- --kernel-name <<<"$HELP"; then
    FILTER=(--kernel-name kns=tokenpool)
  fi
  if ! "$SANITIZER" --require-cuda-init no "${FILTER[@]}" true >>"$LOG" 2>&1; then FILTER=(); fi # another spelling: rather reports too many
fi
# The four tools side by side: most of their time is torch's start on one core.
# shellcheck disable=SC2329 # called by inner shells
sanitize() {
  local tool tools=$1 backend=$2 status=0 processes=() verdicts="" where
  shift 2
  where=$(mktemp -d)
  for tool in $tools; do
    local quiet=()
    if [ "$tool" = memcheck ]; then quiet=(--report-api-errors no); fi # torch asks what may fail
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 $((STAGE_LIMIT > 25 ? STAGE_LIMIT - 15 : 10)) "$SANITIZER" --tool "$tool" --error-exitcode 9 "${quiet[@]}" "$@" \
      "$PYTHON" -m bench.gpu_checks small --backend "$backend" >"$where/$tool" 2>&1 &
    processes+=("$tool:$!")
  done
  for tool in "${processes[@]}"; do
    if wait "${tool#*:}"; then verdicts+="${tool%:*}: passed"; else verdicts+="${tool%:*}: FAILED, status $?"; status=9; fi
    verdicts+=" $(grep " SUMMARY" "$where/${tool%:*}")"$'\n'
    echo "---- ${tool%:*}"
    tail -n 60 "$where/${tool%:*}"
  done
  printf '%s' "$verdicts"
  return "$status"
}
export -f sanitize
export SANITIZER PYTHON
if [ -z "$SANITIZER" ]; then
  stage sanitizers 1 5 bash -c 'echo "compute-sanitizer is not installed"; exit 3'
else
  stage sanitizers 1 115 bash -c 'sanitize "$@"' sanitize "memcheck racecheck initcheck synccheck" cuda "${FILTER[@]}"
fi

# Compiling Triton's kernels takes most of the time of its tests: side by side, where pytest-xdist is there.
PARALLEL=()
if "$PYTHON" -c "import xdist" 2>/dev/null; then PARALLEL=(-n 8); fi
TESTS=(-q --maxfail=20 "${PARALLEL[@]}" tests/test_clustering.py tests/test_pool.py tests/test_attention_received.py
  tests/test_invariance.py tests/test_regressions.py tests/test_kmeans.py tests/test_kmedoids.py tests/test_autograd.py)
stage tests_cuda 1 90 "$PYTHON" -m bench.gpu_checks tests --backends=cuda -k cuda "${TESTS[@]}"
stage invariants 1 60 "$PYTHON" -m bench.gpu_checks invariants --backend cuda --json "$CHECKS"
# Triton, and the peers that must be compiled. What does not fit into this call is named at its end, for a second one.
stage tests_triton 1 120 "$PYTHON" -m bench.gpu_checks tests --backends=triton -k triton "${TESTS[@]}" \
  tests/test_triton_gpu.py tests/test_triton_cases.py
stage parity_triton 1 60 "$PYTHON" -m bench.gpu_checks parity --backend triton --json "$CHECKS"
stage invariants_triton 1 60 "$PYTHON" -m bench.gpu_checks invariants --backend triton --json "$CHECKS"
if [ -n "$SANITIZER" ]; then # no filter by name: torch's own kernels keep their races and addresses, too
  stage sanitizers_triton 1 115 bash -c 'sanitize "$@"' sanitize "memcheck racecheck" triton
fi
stage bench_triton 0 100 "$PYTHON" -m bench --suite vit --device cuda "${CORES[@]}" --backend cuda,triton --dtype bfloat16 \
  --batch 256 --peers torch_compile,torch_eager_gram --repeats 7 --json "$OUT/gpu_triton.json"
stage call_cost 0 30 "$PYTHON" -m bench.call_cost --device cuda
exit "$FAILED"
