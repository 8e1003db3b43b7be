"""Where things are in the repository."""

from pathlib import Path


ROOT = Path(__file__).parent.parent.parent
# Each measurement has a folder here.
MEASUREMENTS = ROOT / "benchmarks"
