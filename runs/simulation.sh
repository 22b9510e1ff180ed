#!/usr/bin/env bash
# The table of results/simulation.md: a million simulated histories, and the planted bugs. About 20 minutes on two cores.
# HISTORIES=100000 runs/simulation.sh plays fewer. The report goes to the standard output.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
exec .venv/bin/python -m benchmarks.simulation --histories "${HISTORIES:-1000000}" --plants
