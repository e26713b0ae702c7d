"""python tests/with_stand_in.py SCRIPT FLAGS: runs a Craftax or Memory Maze script with a stand-in for the game."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from cue_maze import make_env

if __name__ == "__main__":
    script = importlib.import_module(sys.argv.pop(1))
    if hasattr(script, "Craftax"):
        from common import CraftaxStandIn  # here, since it starts JAX, and --distributed must come first

        script.Craftax = CraftaxStandIn
    else:
        script.make_env = make_env
    script.main(script.parse_args())
