"""Hessian traces; with --cal_solve the integer programme; with --evaluate its SubNets. See code/paper.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from paper import main

if __name__ == "__main__":
    main("Super_net_solve/cal_hessian.py")
