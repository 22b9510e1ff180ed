#!/usr/bin/env bash
# The page results/schemes-fashion-mnist.md: DeepTracer's Tables 1 and 2 with thirteen watermarks, three seeds.
# And results/false-claims-fashion-mnist.md: each key asked of the other seeds' benign models.
# Real Fashion-MNIST is needed (EXSIM_DATA=DIR).
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/schemes-fashion-mnist
rm -rf "$out"
.venv/bin/exsim run schemes-fashion-mnist --set 'seeds=[0, 1, 2]' --out "$out"
.venv/bin/python runs/paper_tables.py "$out" schemes-fashion-mnist
.venv/bin/python runs/false_claims.py "$out" false-claims-fashion-mnist
