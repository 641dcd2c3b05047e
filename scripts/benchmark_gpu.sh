#!/bin/sh
# All that is to be known of a GPU, on a machine without a network, by one command, in minutes:
#
#   sh scripts/benchmark_gpu.sh WHEELS [OUT [FLAGS]]
#
# WHEELS is a folder that a machine with a network has filled:
#
#   pip download --no-deps --dest WHEELS diffusers
#
# All else that films and trainings need (torch, transformers, peft, accelerate, ...) is used as it is installed;
# writing and reading mp4 is not measured, so decord and imageio-ffmpeg may be missing.
# PYTHON names another interpreter than python3. FLAGS: --rows A,B; --seconds S; --dry-run.
# The rows go to OUT (runs/benchmark) as they are known: gpu.jsonl, and gpu.md at the end.
set -eu
wheels=${1:?usage: sh scripts/benchmark_gpu.sh WHEELS [OUT [FLAGS]]}
shift
out=${1:-runs/benchmark}
[ $# -eq 0 ] || shift
python=${PYTHON:-python3}
project=$(cd "$(dirname "$0")/.." && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --no-index --no-deps --no-compile --find-links "$wheels" --target "$site" diffusers
PYTHONPATH=$site:$project "$python" -m cdvideo.evaluation.benchmark_gpu --out "$out" "$@"
