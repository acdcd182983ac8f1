"""Fold many random networks and compare them with the originals in float64.

    python scripts/fuzz.py --count 10000 --seed 0

Exits with 1 when any is wrong or crashes, with the seeds: ``tests.fuzzing.check(seed)`` repeats one exactly. Keep such
a seed in ``tests/test_fuzz.py``."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tests.fuzzing import Tally, check


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    total, bad, started = Tally(), {}, time.perf_counter()
    for number, seed in enumerate(range(options.seed, options.seed + options.count), 1):
        try:
            tally = check(seed)
        except Exception as error:
            bad[seed] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"seed {seed}: {bad[seed]}", flush=True)
            continue
        total.foldable += tally.foldable
        total.folded += tally.folded
        total.error = max(total.error, tally.error)
        if number % 500 == 0:
            print(f"{number} networks, {len(bad)} bad, {time.perf_counter() - started:.0f} s", flush=True)
    share = total.folded / max(1, total.foldable)
    print(
        f"{options.count} networks from seed {options.seed}: {len(bad)} wrong or crashed; "
        f"{total.folded} of {total.foldable} norms with fixed statistics folded ({share:.1%}); "
        f"largest relative error {total.error:.1e}"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
