"""What the routers of a model did: sums over tokens only, so that ranks, micro-batches and windows add up.

Training counts tokens only; observing a model also fills the sums that the criteria need. `sums.py` is their table.
"""

from secateur.stats.layer import LayerStats
from secateur.stats.router import RouterStats
from secateur.stats.sums import DEFAULT_SUMS, SUMS, Seen, Sum, recorded

__all__ = ["DEFAULT_SUMS", "SUMS", "LayerStats", "RouterStats", "Seen", "Sum", "recorded"]
