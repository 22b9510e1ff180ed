#!/usr/bin/env bash
# The table results/coupling-ablation.md: DeepTracer's Table 4 at an active margin, four seeds. Needs EXSIM_DATA.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/coupling-ablation
rm -rf "$out"
.venv/bin/exsim run coupling-ablation --local --set 'seeds=[0,1,2,3]' --out "$out"
runs/keep.sh "$out" coupling-ablation
.venv/bin/python runs/coupling_table.py "$out" coupling-fashion-mnist
