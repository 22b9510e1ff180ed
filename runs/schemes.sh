#!/usr/bin/env bash
# The page results/schemes.md: thirteen watermarks, ten thefts with their controls, three seeds, on digits.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/schemes
rm -rf "$out"
.venv/bin/exsim run schemes --set 'seeds=[0, 1, 2]' --out "$out"
.venv/bin/python runs/paper_tables.py "$out" schemes
.venv/bin/python runs/false_claims.py "$out" false-claims-digits
