"""The old import path of `secateur.models.vmoe`, kept for one release."""

from secateur.models.vmoe import VMoEConfig as VMoEConfig
from secateur.models.vmoe import VMoEForImageClassification as VMoEForImageClassification
from secateur.models.vmoe import VMoEModel as VMoEModel
