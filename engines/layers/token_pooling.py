"""Merges the vectors of a document's tokens into fewer: clusters them and replaces each cluster by its mean.

The definition is that of `HierarchicalTokenPooling` in sentence-transformers 6.2: Ward's linkage over cosine distances,
cut into `n // factor` clusters. It takes time and memory that grow with the square of the number of vectors, so that
`MAX_POOLED_VECTORS` bounds it. Needs scipy, which is imported when first used: few servers pool tokens.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from msgspec import Struct
from torch import Tensor
from torch.nn.functional import normalize

MAX_POOLED_VECTORS = 4096
"""The most vectors of one document that are clustered: 0.3 GB, and about a second."""


class TokenPooling(Struct, frozen=True, kw_only=True):
    """How the vectors of a text are merged.

    Args:
        factor: about one in so many vectors is left; at least 1, which merges none.
        num_protected: leading vectors that are left as they are.
        normalized: whether all vectors are brought to length one afterwards, also where none were merged.
    """

    factor: float = 1.0
    num_protected: int = 1
    normalized: bool = True

    def __call__(self, vectors: Tensor) -> Tensor:
        """Merges vectors, float32 `[n, W]`, into `[max((n - protected) // factor, 1) + protected, W]` or fewer."""
        pooled = self._merged(vectors) if self.factor > 1 else vectors
        return normalize(pooled, dim=-1) if self.normalized else pooled

    def _merged(self, vectors: Tensor) -> Tensor:
        first, rest = vectors[: self.num_protected], vectors[self.num_protected :]
        num_clusters = max(int(len(rest) // self.factor), 1)
        if num_clusters >= len(rest):
            return vectors
        means = _cluster_means(rest.cpu(), num_clusters)
        return torch.cat([first, means.to(vectors.device)])


def merging(poolings: Sequence[TokenPooling]) -> str:
    """Names the merges that vectors go through one after the other, for the names of spaces; empty without."""
    return str(tuple(poolings)) if poolings else ""


def has_clustering() -> bool:
    """Tells whether the library that clusters vectors is installed."""
    return find_spec("scipy") is not None


def _cluster_means(vectors: Tensor, num_clusters: int) -> Tensor:
    """Returns the means of at most `num_clusters` clusters of vectors `[n, W]`."""
    from scipy.cluster.hierarchy import fcluster, linkage  # see the module's docstring
    from scipy.spatial.distance import squareform  # see the module's docstring

    distances = (1 - vectors @ vectors.T).clamp_(0, 2).numpy()
    tree = linkage(squareform(distances, checks=False), method="ward")
    labels = torch.from_numpy(fcluster(tree, t=num_clusters, criterion="maxclust")).long()
    _, cluster = torch.unique(labels, return_inverse=True)
    sizes = torch.bincount(cluster)
    sums = vectors.new_zeros(len(sizes), vectors.shape[1]).index_add_(0, cluster, vectors)
    return sums / sizes[:, None]
