"""The old import path of `secateur.models.vmoe`, kept for one release."""

from secateur.models.vmoe import __all__ as __all__
from secateur.models.vmoe import __getattr__ as __getattr__
