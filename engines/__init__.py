"""Models on a device: loading them, running them, and deciding which of them are in memory.

The door is `engines.host.Host`; the leaves `spec`, `types` and `errors` are what crosses it.
Nothing in this package knows HTTP.
"""

import os

# GNU OpenMP reads this once, when torch is imported. Its default lets a thread spin for milliseconds at every barrier:
# with one other busy process on two cores a batch took 6 × as long as with this value, and on an idle machine the two
# are alike. An operator's own value wins.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
