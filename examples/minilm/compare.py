"""How close the embeddings of a quantized encoder are to those of the float one."""

from typing import NamedTuple

import numpy as np


class Agreement(NamedTuple):
    """Attributes:
    mean, lowest: of the cosines between a sentence's two embeddings.
    similarity_error: root mean square difference of the similarity of two sentences, over all pairs.
    """

    mean: float
    lowest: float
    similarity_error: float


def agreement(embeddings: np.ndarray, reference: np.ndarray) -> Agreement:
    """Compares embeddings (b, d) of length 1 with the float encoder's."""
    embeddings, reference = embeddings.astype(np.float64), reference.astype(np.float64)
    cosines = np.sum(embeddings * reference, axis=-1)
    pairs = np.triu_indices(len(reference), 1)
    difference = (embeddings @ embeddings.T - reference @ reference.T)[pairs]
    return Agreement(float(cosines.mean()), float(cosines.min()), float(np.sqrt(np.mean(difference**2))))


def closest_pairs(embeddings: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The pairs of rows with the largest products, no row in two pairs."""
    products = np.triu(embeddings @ embeddings.T, 1)
    pairs = []
    for _ in range(count):
        i, j = np.unravel_index(np.argmax(products), products.shape)
        pairs.append((int(i), int(j)))
        products[[i, j]] = products[:, [i, j]] = 0
    return pairs
