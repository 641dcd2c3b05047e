#!/bin/sh
# All benchmarks that need a GPU, on a machine without a network, by one command:
#
#   sh scripts/benchmark_gpu.sh WHEELS [OUT]
#
# WHEELS is a folder that a machine with a network and the same Python has filled, in this repository:
#
#   pip download --dest WHEELS . "setuptools>=77" "xformers>=0.0.35"
#
# Packages that are installed already, such as torch, are used as they are; otherwise WHEELS holds them too, some GB.
# PYTHON names another interpreter than python3: not a virtual environment's, whose packages are not seen from here.
# Tables and JSON go to OUT (runs/benchmark).
set -u
wheels=${1:?usage: sh scripts/benchmark_gpu.sh WHEELS [OUT]}
out=${2:-runs/benchmark}
mkdir -p "$out" || exit 2
"${PYTHON:-python3}" -m venv --system-site-packages "$out/venv" || exit 1
python=$out/venv/bin/python
project=$(cd "$(dirname "$0")/.." && pwd)
"$python" -m pip install --quiet --no-index --find-links "$wheels" "$project" || exit 1
# Only the doctor tries xformers; without it all else is measured.
"$python" -m pip install --quiet --no-index --find-links "$wheels" xformers || echo "xformers is left out" >&2

failed=0
run() { # what fails is told, and the rest is still measured
    "$python" "$project/scripts/$@" || { echo "failed: $*" >&2; failed=1; }
}
gpu="--base random-sd15 --device cuda --dtype bf16 --width 512 --height 512"
run doctor.py
# shellcheck disable=SC2086 # flags, to be split
{
    run benchmark.py sampler $gpu --frames 16 --speed exact,compiled,balanced,fast --out "$out"
    run benchmark.py decode $gpu --frames 64 --out "$out"
    run benchmark.py length $gpu --steps 10 "lengths=[16,128]" --out "$out"
}
run benchmark.py concepts --device cuda --out "$out"
run benchmark.py memory --device cuda --out "$out"
run benchmark.py training-step --device cuda --out "$out"
exit $failed
