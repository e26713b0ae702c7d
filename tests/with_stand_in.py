"""python tests/with_stand_in.py SCRIPT FLAGS: a script of Craftax or Memory Maze, with a stand-in for the game."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from cue_maze import make_env

if __name__ == "__main__":
    script = importlib.import_module(sys.argv.pop(1))
    if hasattr(script, "Craftax"):
        from common import CraftaxStandIn  # here, since it starts JAX, which --distributed has to come before

        script.Craftax = CraftaxStandIn
    else:
        script.make_env = make_env
    script.main(script.parse_args())
