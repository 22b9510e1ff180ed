#!/usr/bin/env bash
# keep-detections.sh NAME RUN_DIR...: what the detectors of some runs found, as results/NAME.md.
set -euo pipefail
.venv/bin/python - "$@" <<'P'
import json, shlex, sys
from pathlib import Path
import duckdb, yaml
from simulator.ownership.wsr import wilson_interval
name, runs = sys.argv[1], [Path(each) for each in sys.argv[2:]]
QUERY = """
WITH clients AS (
    SELECT id, source, detector || ' δ = ' || (detector_params->>'delta') AS detector, client, queries, detected_at, statistic
    FROM read_parquet('{run}/detections/*.parquet')),
thefts AS (SELECT DISTINCT scenario_id, attack, attack_params, labels, pool, accounts, seed FROM read_parquet('{run}/results/*.parquet') WHERE role = 'stolen')
SELECT coalesce(attack, 'benign client') AS attack, attack_params, coalesce(pool, source) AS pool, labels, accounts, detector,
    count(*) AS clients, count(detected_at) AS noticed, median(detected_at) AS after, max(detected_at) AS latest, min(statistic) AS least
FROM clients LEFT JOIN thefts ON scenario_id = id GROUP BY ALL
"""
HEAD = "| attack | pool | labels | accounts | detector | noticed (clients) | 95 % interval | after, median | latest | least W |\n|---|---|---|---:|---|---:|---:|---:|---:|---:|\n"
def differing(params, others):
    mine, theirs = json.loads(params or "{}"), [json.loads(other or "{}") for other in others]
    leaves = {key: value for key, value in mine.items() if not isinstance(value, dict) and key != "accounts"}
    shown = [f"{key}={value}" for key, value in leaves.items() if any(key in each and each[key] != value for each in theirs)]
    return f" ({', '.join(shown)})" if shown else ""
text = [f"# {name}\n"]
for run in runs:
    info = json.loads((run / "run.json").read_text())
    commit = (info["git_commit"] or "unknown")[:12] + (" with changes" if info["git_dirty"] else "")
    text.append(f"`{shlex.join(['exsim', *info['argv'][1:]])}`\n\ncommit {commit}, seeds {info['seeds']}, status {info['status']}\n")
    rows = duckdb.sql(QUERY.format(run=run)).fetchall()
    rows.sort(key=lambda row: (row[0] == "benign client", [str(cell) for cell in row[:6]]))
    lines = [HEAD]
    for attack, params, pool, labels, accounts, detector, clients, noticed, after, latest, least in rows:
        others = [row[1] for row in rows if row[0] == attack]
        low, high = wilson_interval(noticed, clients)
        interval = "–" if attack == "benign client" else f"{100 * low:.0f} to {100 * high:.0f} %"
        cells = [attack + differing(params, others), pool, labels or "–", accounts or "–", detector, f"{noticed} of {clients}", interval, "–" if after is None else f"{after:.0f}", latest or "–", "–" if least is None else f"{least:.3f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |\n")
    text.append("".join(lines))
    clients = yaml.safe_load((run / "config.yaml").read_text())["benign_clients"]
    text.append(f"{clients['count']} benign clients for each source and victim ask {clients['queries']} of the source's images each: they share images, "
                "so they are fewer independent ones than their number says, and no interval is given.\n")
    text.append((run / "report/table.md").read_text())
Path("results").mkdir(exist_ok=True)
Path(f"results/{name}.md").write_text("\n".join(text))
print(f"results/{name}.md")
P
