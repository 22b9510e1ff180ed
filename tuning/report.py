"""Placeholder."""
from pathlib import Path
from rich.console import Console
def write_sweep_report(path: Path) -> Path:
    return path
def print_sweep(path: Path, console: Console) -> None:
    import json
    console.print(json.loads((path/"sweep/recommendation.json").read_text()))
