"""python tests/with_stand_in.py SCRIPT FLAGS: runs a Craftax or Memory Maze script with a stand-in for the game.

On Memory Maze with several devices, it prints which collectives the learning uses (test_devices_share_the_learning).
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from cue_maze import make_env


def show_collectives(host_update):
    """The same function, which prints them."""
    from devices import collectives

    def wrapped(args, envs, act_jit, learn_jit, *state):
        def learn(*inputs):
            print("collectives:", *collectives(learn_jit.lower(*inputs).compile().as_text()))
            return learn_jit(*inputs)

        return host_update(args, envs, act_jit, learn, *state)

    return wrapped


if __name__ == "__main__":
    script = importlib.import_module(sys.argv.pop(1))
    if hasattr(script, "Craftax"):
        from common import CraftaxStandIn  # here, since it starts JAX, and --distributed must come first

        script.Craftax = CraftaxStandIn
    else:
        import jax

        script.make_env = make_env
        if jax.device_count() > 1:
            script.host_update = show_collectives(script.host_update)
    script.main(script.parse_args())
