#!/usr/bin/env bash
# Cross-compiles the CPU kernels for arm64 and runs tests/native_check.cpp on an emulated processor. Debian and Ubuntu:
# apt-get install g++-aarch64-linux-gnu qemu-user.    CXX=g++ RUN= tests/aarch64.sh: for this processor instead
set -euo pipefail
cd "$(dirname "$0")/.."
CXX=${CXX-aarch64-linux-gnu-g++} RUN=${RUN-"qemu-aarch64 -L /usr/aarch64-linux-gnu"}
BUILD=$(mktemp -d) && trap 'rm -rf "$BUILD"' EXIT
SOURCES="csrc/planner.cpp tests/native_check.cpp $(ls csrc/cpu/*.cpp)"
for source in $SOURCES; do echo "$source"; done | xargs -P 2 -I{} sh -c \
  "$CXX -std=c++17 -O2 -fno-math-errno -Wall -Wextra -Werror -c {} -o $BUILD/\$(basename {}).o"
$CXX -o "$BUILD/check" "$BUILD"/*.o -lpthread
$RUN "$BUILD/check"
