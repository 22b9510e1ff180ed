#!/usr/bin/env bash
# The tables results/in-distribution-cifar10.md (NaiveNet, three seeds, 20 minutes on two cores) and
# results/in-distribution-cifar10-vgglike.md (the paper's net, one seed, without controls, an hour). Needs EXSIM_DATA.
set -euo pipefail
cd "$(dirname "$0")/.."
steal() { # NAME [OPTION]...
  local name=$1
  shift
  rm -rf "runs/$name"
  .venv/bin/exsim run runs/in-distribution-cifar10.yaml "$@" --out "runs/$name"
  runs/keep.sh "runs/$name" "$name"
}
steal in-distribution-cifar10
steal in-distribution-cifar10-vgglike --set architecture=vgglike --set key_filter.architecture=vgglike --set controls=false --set 'seeds=[0]'
