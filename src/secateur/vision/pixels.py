"""The old import path of `secateur.models.vmoe.pixels`, kept for one release."""

from secateur.models.vmoe.pixels import default_pixels as default_pixels
