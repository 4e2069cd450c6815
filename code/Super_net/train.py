"""SuperNet training, and its evaluation. See code/paper.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from paper import main

if __name__ == "__main__":
    main("Super_net/train.py")
