"""The example plug-in is installed beside the simulator, is listed, is run and gives verdicts, with no edit here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "examples" / "plugin"
CONFIG = """
name: extras
dataset: {name: digits, owner: 200}
architecture: nin
training: &short {epochs: 3, batch_size: 32, learning_rate: 5e-3}
watermarks: [sinusoid]
key_filter: {stages: none}
scenarios:
  - attack: {name: blends, training: *short}
    pool: attacker
    budget: 200
    then: [{removal: {name: lipschitz_pruning, deviations: 1}}]
"""
COMPONENTS = {
    "attacks": "blends",
    "watermarks": "sinusoid",
    "removals": "lipschitz_pruning",
    "ownership_tests": "binomial",
    "models": "nin",
}
# The command line several times in one process, which pays for the imports once. A "*" in an argument is a file.
DRIVER = """
import json, sys
from pathlib import Path
from simulator.cli import entry

for line in json.loads(sys.argv[1]):
    found = [str(next(Path().glob(word))) if "*" in word else word for word in line]
    sys.argv = ["exsim", *found]
    print("$", *found, flush=True)
    try:
        entry()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    print("exit status", code, flush=True)
"""


def install(site: Path) -> None:
    """Puts the package and what an installer writes beside it into ``site``: no network and no build backend."""
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    package = project["name"].replace("-", "_")
    shutil.copytree(SOURCE / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    info = site / f"{package}-{project['version']}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(metadata)
    groups = project["entry-points"].items()
    lines = [
        f"[{group}]\n" + "".join(f"{left} = {right}\n" for left, right in points.items()) for group, points in groups
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.mark.slow
def test_the_example_is_listed_run_and_verifies(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site)
    (tmp_path / "config.yaml").write_text(CONFIG)
    lines = [
        ["list"],
        ["run", "config.yaml", "--local", "--out", "run"],
        [
            "verify",
            "run/models/sinusoid-*.safetensors",
            "--key",
            "run/keys/sinusoid-*[0-9a-f].safetensors",
            "--test",
            "binomial",
        ],
    ]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(lines)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(site))), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    listed, ran, verdict = done.stdout.split("\n$ ") if done.stdout.startswith("$ ") else ("", "", "")
    for family, name in COMPONENTS.items():
        section = listed.split(f"\n{family} ", 1)[1]
        assert f"\n  {name} " in section, family
    assert "exit status 0" in ran, done.stderr
    rows = pq.read_table(tmp_path / "run" / "results").to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["role"] for row in rows} == {"benign", "victim", "stolen", "removed"}
    assert {row["architecture"] for row in rows} == {"nin"}
    assert {row["attack"] for row in rows if row["role"] == "stolen"} == {"blends"}
    assert {row["removal"] for row in rows if row["role"] == "removed"} == {"lipschitz_pruning"}
    assert "level 1e-06" in verdict
    assert verdict.rstrip().endswith("exit status 0"), "the victim itself is verified"
