#!/usr/bin/env bash
# Keeps the tables of a sweep and its map: keep-sweep.sh SWEEP_DIR NAME -> results/NAME.md, docs/NAME.svg
set -euo pipefail
from=$1 name=$2
{
  printf '# %s\n\n' "$name"
  .venv/bin/python - "$from/run.json" <<'PY'
import json, shlex, sys
info = json.load(open(sys.argv[1]))
print(f"`{shlex.join(['exsim', *info['argv'][1:]])}`\n")
print(f"commit {info['git_commit'][:12]}{' with changes' if info['git_dirty'] else ''}, status {info['status']}\n")
PY
  cat "$from/report/table.md"
} >"results/$name.md"
cp "$from/report/map.svg" "docs/${name//-/_}.svg"
echo "results/$name.md"
