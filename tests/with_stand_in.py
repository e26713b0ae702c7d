"""python tests/with_stand_in.py SCRIPT FLAGS: one of Craftax's scripts, with what stands in for the game in tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import CraftaxStandIn, load

if __name__ == "__main__":
    script = load(sys.argv.pop(1))
    script.Craftax = CraftaxStandIn
    script.main(script.parse_args())
