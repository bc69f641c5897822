"""Models on a device: loading them, running them, and deciding which of them are in memory.

The door is `engines.host.Host`; the leaves `spec`, `types` and `errors` are what crosses it.
Nothing in this package knows HTTP.
"""

import os
import sys

# GNU OpenMP reads these once, when torch is imported. Its default lets a thread spin for milliseconds at every barrier:
# with one other busy process on two cores a batch took 6 × as long. But each device thread has a team of its own, and
# where all teams have more threads than there are cores, only the policy keeps threads from sleeping at once: in
# bfloat16 a long text alone took 1.75 × as long. An operator's own values win; LLVM's OpenMP, which reads the policy
# too, would spin for ever.
if sys.platform == "linux":
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")

# oneDNN and torch each keep the kernels of the last 1024 shapes, and a kernel has 0.3 to 0.6 MB: 305 MB after 512
# lengths of one product, 60 MB with these bounds. Making one again takes 0.2 to 0.5 ms. A model whose rows have
# `engines.layers.products.rounded_rows` has 44 shapes of each product up to 512 tokens; with 64 kernels for four
# products mixed texts were 1.03 times as slow as with 192. Read by the libraries at their first product.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")
