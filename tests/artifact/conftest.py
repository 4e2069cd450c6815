import sys
from pathlib import Path

# What the tests here share, and the generator of mutations that they share with the benchmark.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]
