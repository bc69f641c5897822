"""Models on a device: loading them, running them, and deciding which of them are in memory.

The door is `engines.host.Host`; the leaves `spec`, `types` and `errors` are what crosses it.
Nothing in this package knows HTTP.
"""

import os

# GNU OpenMP reads this once, when torch is imported. Its default lets a thread spin for milliseconds at every barrier:
# with one other busy process on two cores a batch took 6 × as long as with this value, and on an idle machine the two
# are alike. An operator's own value wins.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# oneDNN and torch each keep the kernels of the last 1024 shapes. Every length of a row is a shape for each product of a
# model, and a kernel has 0.3 to 0.6 MB: 305 MB after 512 lengths of one product, 29 MB with these bounds. Making one
# again takes 0.1 ms. Read by the libraries at their first product.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")
