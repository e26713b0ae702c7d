"""python tests/with_stand_in.py SCRIPT FLAGS: a script of Craftax or Memory Maze, with a stand-in for the game.

--made-up-rollouts, of Memory Maze: random rollouts, the same in every update, however many processes there are.
"""

import functools
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from cue_maze import made_up_rollout, make_env

if __name__ == "__main__":
    script = importlib.import_module(sys.argv.pop(1))
    if hasattr(script, "Craftax"):
        from common import CraftaxStandIn  # here, since it starts JAX, which --distributed has to come before

        script.Craftax = CraftaxStandIn
    else:
        script.make_env = make_env
        if "--made-up-rollouts" in sys.argv:
            sys.argv.remove("--made-up-rollouts")
            script.host_rollout = functools.partial(made_up_rollout, script)
    script.main(script.parse_args())
