#!/bin/bash
# A node of a DiT stage in a JobSet: dit_node.sh STAGE, with NODES, COORDINATOR (host of the first
# pod) and JOB_COMPLETION_INDEX. The first node runs the stage through DVC, which launches torchrun;
# the others join with the job file that the stage writes into its state folder.
set -euo pipefail
stage=$1
export PATH="$PWD/.venv/bin:$PATH"
mkdir -p runs
started=$(mktemp "runs/.node-$JOB_COMPLETION_INDEX-XXXXXX")
trap 'rm -f "$started"' EXIT

if [ "$JOB_COMPLETION_INDEX" -eq 0 ]; then
  # Where the ranks meet is no parameter of the stage: DVC's lock and the stage's key stay.
  python - <<'PYTHON'
import os
from pathlib import Path

import yaml

path = Path("params.yaml")
values = yaml.safe_load(path.read_text())
wanted = int(os.environ["NODES"])
if values["runtime"]["nodes"] != wanted:
    raise SystemExit(f"params.yaml: runtime.nodes = {values['runtime']['nodes']}, set has {wanted}")
values["runtime"]["rendezvous_endpoint"] = f"{os.environ['COORDINATOR']}:29400"
path.write_text(yaml.safe_dump(values, sort_keys=False))
PYTHON
  dvc --wait-for-lock repro -s "$stage"
else
  until job=$(find "runs/$stage" -name job.json -newer "$started" 2>/dev/null | head -n 1) &&
    [ -n "$job" ]; do sleep 2; done
  python -m components.training.dit.worker "$job" --join
fi
