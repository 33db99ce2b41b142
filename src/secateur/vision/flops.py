"""The old import path of `secateur.models.vmoe.flops`, kept for one release."""

from secateur.models.vmoe.flops import flops_per_image as flops_per_image
