#!/usr/bin/env bash
# The report results/chaos.md: at least 100 kills of every kind of process in at least 10 minutes. About 20 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
report=$(mktemp)
trap 'rm -f "$report"' EXIT
command=(-m benchmarks.chaos --kills 100 --minutes 10 --seed 0)
status=0
.venv/bin/python "${command[@]}" --report "$report" || status=$?
commit=$(git rev-parse --short=12 HEAD)
git diff --quiet HEAD || commit="$commit with changes"
mkdir -p results
{
  printf '# Chaos\n\n`python %s`\n\ncommit %s\n\n' "${command[*]}" "$commit"
  sed 's/^/    /' "$report"
} > results/chaos.md
echo results/chaos.md
exit "$status"
