#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer in a copy of the source and runs tests and
# the fuzz on them; any finding fails.    tests/sanitize.sh PYTHON [PYTEST_ARGUMENTS]
set -euo pipefail
PYTHON=$(realpath -s "$1") && shift
cd "$(dirname "$0")/.."
COPY=${TMPDIR:-/tmp}/tokenpool_ext_sanitize
mkdir -p "$COPY"
cp -r --update setup.py pyproject.toml README.md LICENSE csrc tests tokenpool_ext "$COPY"
rm -f "$COPY"/tokenpool_ext/*.so && cd "$COPY"

export CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1"
LDFLAGS="-fsanitize=address,undefined" TOKENPOOL_EXT_CUDA=0 "$PYTHON" setup.py --quiet build_ext --inplace
# Python itself is not built with it: the runtime comes first, and what Python keeps to its end is no leak. torch may be
# linked with another libstdc++; exceptions are found again where that comes first, too.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0,abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1,halt_on_error=1
export PYTHONPATH=$COPY PYTHONMALLOC=malloc
"$PYTHON" tests/fuzz.py --cases "${CASES:-3000}"
for isa in "" avx2 baseline; do
  TOKENPOOL_EXT_CPU_ISA=$isa "$PYTHON" -m pytest --require=cpu -p no:cacheprovider "${@:-tests/test_clustering.py}" -k "${SELECT:-cpu or not backend}"
done
