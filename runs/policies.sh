#!/usr/bin/env bash
# The tables results/policies-*.md: what an answer policy costs the thief and the watermark; three seeds.
# Fashion-MNIST is run where EXSIM_DATA is set.
set -euo pipefail
cd "$(dirname "$0")/.."
run() {
  rm -rf "runs/$1"
  .venv/bin/exsim run "$1" --set 'seeds=[0,1,2]' --out "runs/$1"
  runs/keep.sh "runs/$1" "$2"
}
run policies policies-digits
if [ -n "${EXSIM_DATA:-}" ]; then run policies-fashion-mnist policies-fashion-mnist; fi
