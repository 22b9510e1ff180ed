#!/usr/bin/env bash
# The table results/in-distribution-cifar10.md: three seeds, with controls; a quarter of an hour on two cores. Needs EXSIM_DATA.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/in-distribution-cifar10
rm -rf "$out"
.venv/bin/exsim run runs/in-distribution-cifar10.yaml --out "$out"
runs/keep.sh "$out" in-distribution-cifar10
