#!/usr/bin/env bash
# The page results/sweep-fashion-mnist.md and docs/sweep_fashion_mnist.svg: margin, λ4 and centroid rule on Fashion-MNIST,
# 42 trials; about 20 minutes of two cores. Real Fashion-MNIST is needed (EXSIM_DATA=DIR).
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/sweep-fashion-mnist
rm -rf "$out"
.venv/bin/exsim sweep fashion-mnist-quick --out "$out"
runs/keep-sweep.sh "$out" sweep-fashion-mnist
