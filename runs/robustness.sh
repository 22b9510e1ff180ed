#!/usr/bin/env bash
# The page results/robustness.md: removals of five watermarks' victims and of a stolen copy of each, three seeds, on digits.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/robustness
rm -rf "$out"
.venv/bin/exsim run robustness --set 'seeds=[0, 1, 2]' --out "$out"
runs/keep.sh "$out" robustness
