#!/usr/bin/env bash
# The page results/robustness-fashion-mnist.md: removals of thirteen watermarks' victims and of a stolen copy of each, three
# seeds. Real Fashion-MNIST and MNIST are needed (EXSIM_DATA=DIR).
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/robustness-fashion-mnist
rm -rf "$out"
.venv/bin/exsim run robustness-fashion-mnist --set 'seeds=[0, 1, 2]' --out "$out"
runs/keep.sh "$out" robustness-fashion-mnist
