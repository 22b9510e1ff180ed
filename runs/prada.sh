#!/usr/bin/env bash
# The table results/prada.md: after how many queries PRADA notices each attack, and how often it accuses benign clients;
# three seeds of digits, and of Fashion-MNIST where EXSIM_DATA is set.
set -euo pipefail
cd "$(dirname "$0")/.."
kept=()
for name in prada-digits ${EXSIM_DATA:+prada}; do
  rm -rf "runs/$name"
  .venv/bin/exsim run "runs/$name.yaml" --out "runs/$name"
  kept+=("runs/$name")
done
runs/keep-detections.sh prada "${kept[@]}"
