#!/usr/bin/env bash
# Installs the package in every way the documents promise, each in a fresh environment, and says what worked.
#
#   tests/install_matrix.sh [WORK_DIR]        PYTHONS="python3.11 python3.12" TORCHES="2.11.0 2.13.0" by default python3, 2.13.0
#
# Needs a package index, a C++ compiler and (for uv) uv from the index. Prints one line a way; stops at no failure, ends
# with status 1 if one failed. The wheel is built once, under the first Python and the first torch.
set -uo pipefail
SOURCE=$(cd "$(dirname "$0")/.." && pwd)
WORK=$(mkdir -p "${1:-/tmp/tokenpool_ext_install}" && cd "${1:-/tmp/tokenpool_ext_install}" && pwd)
PYTHONS=${PYTHONS:-python3} TORCHES=${TORCHES:-2.13.0}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 MAX_JOBS=${MAX_JOBS:-2}
read -r FIRST_PYTHON _ <<<"$PYTHONS" && read -r FIRST_TORCH _ <<<"$TORCHES"
FAILED=0

say() { # WAY COMMAND...: runs it, and says how long it took
  local way=$1 begun=$SECONDS
  shift
  if "$@" >"$WORK/log" 2>&1; then echo "ok      $way ($((SECONDS - begun)) s)"; else
    FAILED=1
    echo "FAILED  $way: $(tail -n 1 "$WORK/log")"
  fi
}
environment() { # NAME PYTHON [TORCH]
  rm -rf "${WORK:?}/$1" && "$2" -m venv "$WORK/$1" && "$WORK/$1/bin/pip" install ${3:+"torch==$3"} numpy
}
check() { # NAME BACKEND: outside the source, pip is content and this backend computes
  cd "$WORK" && "$WORK/$1/bin/pip" check && "$WORK/$1/bin/python" -c "
import torch, tokenpool_ext as tp
assert '$WORK' in tp.__file__, tp.__file__
x = torch.randn(4, 50, 16)
print(tp.backends(), tp.kmeans(x, 9, backend='$2').inertia)"
}
refused() { ! env TOKENPOOL_EXT_CUDA=1 CUDA_HOME= PATH=/usr/bin:/bin "$WORK/base/bin/pip" install --no-deps "$SOURCE" && grep -q "nvcc was not found" "$WORK/log"; }

say "environment" environment base "$FIRST_PYTHON" "$FIRST_TORCH"
say "build tools" "$WORK/base/bin/pip" install build twine "setuptools>=77" uv
rm -rf "$WORK/dist"
say "sdist" "$WORK/base/bin/python" -m build --no-isolation --sdist --outdir "$WORK/dist" "$SOURCE"
say "wheel from the sdist, in isolation" "$WORK/base/bin/pip" wheel --no-deps --wheel-dir "$WORK/dist" "$WORK"/dist/*.tar.gz
say "twine check" "$WORK/base/bin/twine" check --strict "$WORK"/dist/*
WHEEL=$(ls "$WORK"/dist/*.whl)
for python in $PYTHONS; do
  for torch in $TORCHES; do
    say "$python, torch $torch: environment" environment one "$python" "$torch"
    if [ "$python" = "$FIRST_PYTHON" ]; then
      say "$python, torch $torch: the wheel built under torch $FIRST_TORCH" "$WORK/one/bin/pip" install --no-deps "$WHEEL"
    else
      say "$python, torch $torch: from the sdist" "$WORK/one/bin/pip" install --no-deps "$WORK"/dist/*.tar.gz
    fi
    say "$python, torch $torch: computes" check one cpu
  done
done
say "not isolated" "$WORK/base/bin/pip" install --no-deps --no-build-isolation --force-reinstall "$SOURCE"
say "not isolated: computes" check base cpu
say "uv pip install" "$WORK/base/bin/uv" pip install --quiet --python "$WORK/base/bin/python" --no-deps --reinstall "$SOURCE"
say "uv: computes" check base cpu
say "no compiler" env PATH="$WORK/base/bin" CXX= "$WORK/base/bin/python" -m pip install --no-deps --no-build-isolation --force-reinstall "$SOURCE"
say "no compiler: computes" check base reference
say "TOKENPOOL_EXT_CUDA=1 without nvcc is refused" refused
exit $FAILED
