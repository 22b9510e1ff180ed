#!/usr/bin/env bash
# The table results/jbda.md: two margins, three seeds, eleven forms of JBDA. Needs EXSIM_DATA.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/jbda
rm -rf "$out"
.venv/bin/exsim run runs/jbda.yaml --local --out "$out"
runs/keep.sh "$out" jbda
