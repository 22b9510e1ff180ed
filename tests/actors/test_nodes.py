"""A node that is lost in mid-run costs time only: on a cluster whose nodes are processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_is_removed_while_attackers_pay_changes_no_row_and_no_account() -> None:
    """The benchmark compares all rows with the plain loop's, and every account with its budget. The cluster needs a
    process of its own: the session's Ray is another."""
    command = [sys.executable, "-m", "benchmarks.cluster", "--nodes", "2", "--lose", "attacker", "--epochs", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node lost in mid-run: none" not in done.stdout
    assert "8 rows compared, 0 faults" in done.stdout, done.stdout
