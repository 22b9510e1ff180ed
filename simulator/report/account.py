"""The audit of a run's query account, as the report and ``exsim audit-ledger`` tell it."""

from __future__ import annotations

from pathlib import Path

from simulator.records.provenance import read_run_info
from simulator.records.rows import read_rows
from simulator.service.audit import Audit, audit


def audit_run(run: Path) -> Audit:
    """Audits the account of a run directory.

    Raises:
        InputError: it is no run directory, or its rows cannot be read.
    """
    info = read_run_info(run)
    rows = read_rows(run) if any((run / "results").glob("*.parquet")) else []
    return audit(run, rows, info.account, ended=info.status in ("done", "failed"))
