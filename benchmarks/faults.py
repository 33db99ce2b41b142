"""Kill, interrupt, fill the disk, change files underneath, damage what is read: does each command keep its promises?

    make faults                                     # PYTHONPATH=src:tests python benchmarks/faults.py
    make faults FAULTS="--seconds 600"              # a slice of it; the same command goes on after the last trial
    make faults FAULTS="--trial 'kill/plan/2'"      # one trial again, by its name in the list of those that fell

Commands run in children that are forked from one process, on tiny models, in a folder in memory. `docs/faults.md` says
what is done and when it counts as passed. Rows of trials that were made stay in ./benchmark-results/faults.jsonl; those
of another source or seed do not count. Makes faults.json.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from faults_campaign.campaign import PARTS, Campaign, Goal
from faults_campaign.rows import Rows
from faults_campaign.stage import Stage, import_everything, source_digest
from faults_campaign.tables import COLUMNS, fallen, table_of, totals
from record import OWN, parser_for, show, store

GOALS = {"kill": 1000, "pair": 64, "signal": 200, "fill": 200, "change": 224, "damage": 10_000}
MEMORY = Path("/dev/shm")  # flushing to a disk takes most of the time there, and says nothing here


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this one; repeatable")
    parser.add_argument("--case", action="append", help="only this command of the table, or reader; repeatable")
    for part, number in GOALS.items():
        parser.add_argument(f"--{part}s", type=int, default=number, metavar="N", help=f"trials that count: {number}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after so many; the same command goes on")
    parser.add_argument("--trial", help="make this one trial again, whatever was stored, and say what came of it")
    parser.add_argument("--work", type=Path, help="a folder for the runs. Default: a new one in memory")
    arguments = parser.parse_args()
    goals = [Goal(part=part, number=getattr(arguments, f"{part}s")) for part in arguments.part or GOALS]
    home = MEMORY if arguments.work is None and os.access(MEMORY, os.W_OK) else arguments.work
    work = Path(tempfile.mkdtemp(prefix="secateur-faults-", dir=home))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the folder stays
    started = time.monotonic()
    rows = Rows(OWN / "faults.jsonl", source_digest(), arguments.seed)
    try:
        import_everything()
        stage = Stage(work)
        stage.make()
        campaign = Campaign(stage, rows, arguments.seed, arguments.case)
        if arguments.trial:
            campaign.once(arguments.trial)
            return
        campaign.run(goals, None if arguments.seconds is None else started + arguments.seconds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    table = table_of(rows)
    show("Faults: what counted, what passed, what fell", COLUMNS, table)
    fell = fallen(rows)
    for one in fell:
        print(f"fell: {one['trial']}: {one['point']}: {one['detail']}")
    result = {"seed": arguments.seed, "goals": {goal.part: goal.number for goal in goals}, "totals": totals(rows)}
    result |= {"skipped": campaign.skipped, "fell": fell, "table": [COLUMNS, *table]}
    print(f"stored {store('faults', result, stored=arguments.store)}")


if __name__ == "__main__":
    main()
