#!/usr/bin/env bash
# The table results/fashion-mnist-attacks.md: every attacker against the quick victim, three seeds. Needs EXSIM_DATA.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/fashion-mnist-attacks
rm -rf "$out"
.venv/bin/exsim run fashion-mnist-attacks --set 'seeds=[0, 1, 2]' --out "$out"
runs/keep.sh "$out" fashion-mnist-attacks
