#!/usr/bin/env bash
# AddressSanitizer and UndefinedBehaviorSanitizer on native/: the test of the arithmetic, then random control
# vectors through the hook, in llama.cpp as it is installed. Linux with GCC. A first finding ends it.
#
#     native/sanitize.sh [SECONDS] [SEED]
#
# In an environment where localsteer is installed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cmake -S "$root" -B "$work/build" -DLOCALSTEER_SANITIZE=ON -DLOCALSTEER_BUILD_TESTS=ON > "$work/cmake.log"
cmake --build "$work/build" >> "$work/cmake.log"
"$work/build/native/test-steer" | tail -n 1

# the runtimes come first, and libstdc++ with them: exceptions are caught inside of the library
preload=""
for library in libasan.so libubsan.so libstdc++.so; do
  preload+="$(g++ -print-file-name=$library) "
done
# Python itself never frees everything: leaks are not looked for
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
  LOCALSTEER_NATIVE=$(echo "$work/build/native/"liblocalsteer_native.*) \
  python "$root/tests/hostile/fuzz.py" --only steering --seconds "${1:-60}" --seed "${2:-1}"
