"""The layers of encoders: packing, attention, fused products, pooling."""

from engines.layers.losses_without_scipy import import_losses

import_losses()  # before a module of this package imports a model class
