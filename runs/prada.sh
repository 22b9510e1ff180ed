#!/usr/bin/env bash
# prada.sh [digits|fashion-mnist|all] [OPTION]...: the tables results/prada-*.md, after how many queries PRADA notices
# each attack, and how often it accuses benign clients; three seeds. Options go to exsim run. Fashion-MNIST needs
# EXSIM_DATA.
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:-all}
shift || true
keep() {
  local out=runs/$1
  rm -rf "$out"
  .venv/bin/exsim run "runs/$1.yaml" "${@:3}" --out "$out"
  runs/keep-detections.sh "$2" "$out"
}
case $which in
  digits) keep prada-digits prada-digits "$@" ;;
  fashion-mnist) keep prada prada-fashion-mnist "$@" ;;
  all) keep prada-digits prada-digits "$@"; keep prada prada-fashion-mnist "$@" ;;
  *) echo "$which: digits, fashion-mnist or all" >&2; exit 2 ;;
esac
