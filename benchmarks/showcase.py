"""The animation at the top of README: one episode per task, side by side, from folders of runs.

    python ppo_agalite_tmaze.py --evaluate runs/tmaze__... --capture-video      # and so on: saves episode.gif
    python benchmarks/showcase.py docs/tasks.gif runs/tmaze__... runs/MysteryPath... runs/Craftax... runs/MemoryMaze...

Shows the first --steps steps of each episode. A shorter one stays at its end until the animation starts again.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageSequence

NAMES = {"tmaze": "T-Maze", "mysterypath": "Mystery Path", "craftax": "Craftax", "memorymaze": "Memory Maze"}
MEMORIES = {"agalite": "AGaLiTe", "galite": "GaLiTe", "gtrxl": "GTrXL", "lstm": "LSTM", "gru": "GRU"}
WIDTH, TITLE = 480, 26  # of a panel, and the height of its title, in pixels
MILLISECONDS = 100  # per image


def title_of(folder: Path) -> str:
    """Task, memory and number of environment steps of a run."""
    args = json.loads((folder / "args.json").read_text())
    _, memory, task = args["exp_name"].split("_")
    return f"{NAMES[task]}: {MEMORIES[memory]} after {args['total_timesteps'] / 1e6:.2g}M steps"


def panels_of(folder: Path, steps: int, every: int) -> list[Image.Image]:
    """Every `every`-th image of an episode, small and with a title."""
    episode = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(folder / "episode.gif"))][:steps]
    panels = []
    for frame in [*episode[:-1:every], episode[-1]]:
        height = round(WIDTH * frame.height / frame.width)
        panel = Image.new("RGB", (WIDTH, TITLE + height), "white")
        panel.paste(frame.resize((WIDTH, height), Image.Resampling.LANCZOS), (0, TITLE))
        ImageDraw.Draw(panel).text((12, 6), title_of(folder), "#2b2f36", ImageFont.load_default(14))
        panels.append(panel)
    return panels


def main(path: Path, folders: list[Path], steps: int, every: int):
    columns = [panels_of(folder, steps, every) for folder in folders]
    rows = [max(panels[0].height for panels in columns[i : i + 2]) for i in range(0, len(columns), 2)]
    images = []
    for time in range(max(map(len, columns)) + 10):  # the last images stay for a second
        image = Image.new("RGB", (WIDTH * min(len(columns), 2), sum(rows)), "white")
        for i, panels in enumerate(columns):
            image.paste(panels[min(time, len(panels) - 1)], (WIDTH * (i % 2), sum(rows[: i // 2])))
        images.append(image.quantize(64, dither=Image.Dither.NONE))
    images[0].save(path, save_all=True, append_images=images[1:], duration=MILLISECONDS, loop=0, optimize=True)
    print(f"{path}: {len(images)} images of {images[0].size}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the animation to write")
    parser.add_argument("folders", type=Path, nargs="+", help="folders of runs with an episode.gif")
    parser.add_argument("--steps", type=int, default=165, help="steps of each episode to show")
    parser.add_argument("--every", type=int, default=3, help="show one of so many steps")
    main(**vars(parser.parse_args()))
