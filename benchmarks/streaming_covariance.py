"""Class means and covariance of 1,000,000 x 768 float32 features (3 GB) that arrive in batches:
peak memory and time.

python benchmarks/streaming_covariance.py [--n 1000000] [--classes 1000]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from oodlib.scores.moments import stream_moments

DIMENSION, ROWS = 768, 10_000


def batches(n: int, classes: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Unit Gaussian noise about the class's own mean, which is its label / classes in every
    coordinate.
    """
    for start in range(0, n, ROWS):
        rng = np.random.default_rng(start)
        labels = np.arange(start, min(start + ROWS, n)) % classes
        features = rng.standard_normal((len(labels), DIMENSION), dtype=np.float32)
        features += (labels / classes).astype(np.float32)[:, None]
        yield features, labels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    options = parser.parse_args()
    started = time.perf_counter()
    moments = stream_moments(batches(options.n, options.classes), options.classes)
    seconds = time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(
        json.dumps(
            {
                "n": options.n,
                "dimension": DIMENSION,
                "classes": options.classes,
                "seconds": seconds,
                "peak_gib": peak / 2**30,
                "largest_error_of_covariance": float(
                    np.abs(moments.covariance - np.eye(DIMENSION)).max()
                ),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
