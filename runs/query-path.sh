#!/usr/bin/env bash
# The tables results/query-path.md: the query path, the ledger, fairness and memory, on a machine that does nothing else.
# About 8 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
commit=$(git rev-parse --short=12 HEAD)$(git diff --quiet HEAD || echo " with changes")
{
  printf '# Query path\n\n`runs/query-path.sh`, commit %s\n\n```\n' "$commit"
  OMP_NUM_THREADS=1 COLUMNS=120 .venv/bin/python -m benchmarks query_path small_batches grid ledger crowd memory
  printf '```\n'
} >results/query-path.md.new
mv results/query-path.md.new results/query-path.md
echo results/query-path.md
