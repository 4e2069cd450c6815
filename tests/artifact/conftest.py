import sys
from pathlib import Path

# What the tests here share.
sys.path.append(str(Path(__file__).parent))
