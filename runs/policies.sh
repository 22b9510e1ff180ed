#!/usr/bin/env bash
# policies.sh [digits|fashion-mnist|all] [OPTION]...: the tables results/policies-*.md, what an answer policy costs the
# thief and the watermark; three seeds. Options go to exsim run. Fashion-MNIST needs EXSIM_DATA.
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:-all}
shift || true
keep() {
  local out=runs/$1
  rm -rf "$out"
  .venv/bin/exsim run "$1" --set 'seeds=[0, 1, 2]' "${@:3}" --out "$out"
  runs/keep.sh "$out" "$2"
}
case $which in
  digits) keep policies policies-digits "$@" ;;
  fashion-mnist) keep policies-fashion-mnist policies-fashion-mnist "$@" ;;
  all) keep policies policies-digits "$@"; keep policies-fashion-mnist policies-fashion-mnist "$@" ;;
  *) echo "$which: digits, fashion-mnist or all" >&2; exit 2 ;;
esac
