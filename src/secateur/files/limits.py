"""How much a record may hold: beyond, a file is damaged or hostile, and must cost an error, not memory or time."""

from __future__ import annotations

MAX_JSON = 500_000_000  # bytes of a file, or of one line of a log; the largest index there is has about 20 million
MAX_DEPTH = 100  # objects and lists in each other; ours have about 10, and near 1000 Python's own limit is reached
MAX_LAYER = 999_999  # the highest layer id; the deepest models have some hundreds
MAX_EXPERTS = 2**20  # of a layer: "Mixture of a Million Experts" (arXiv 2407.04153) has as many
MAX_COUNT = 2**63 - 1  # tokens, steps, bytes, parameters: what a torch.int64 counter can hold
MAX_FLOAT = 1.7976931348623157e308  # the largest finite number; infinity is above
SHOWN = 80  # characters of a wrong value in a message
