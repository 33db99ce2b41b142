"""`torchrun ... faulty_command.py RANK WORDS...`: `secateur WORDS`, with a rank killed in the middle of the pruning."""

from __future__ import annotations

import sys

from support.faults import Kill, OnRank
from support.small_jobs import command

if __name__ == "__main__":
    command(sys.argv[2:], OnRank(int(sys.argv[1]), Kill("secateur.train.distributed.surgery:set_counts_", 2)))
