"""Some frames of an episode's GIF in one image, one below another: the images at the top of pages in docs/.

    python benchmarks/stills.py runs/.../episode.gif docs/mysterypath.png 5 8 13

takes the fifth, eighth and thirteenth frame. --capture-video makes the GIF.
"""

import sys

from PIL import Image


def main(gif: str, path: str, numbers: list[int]):
    with Image.open(gif) as episode:
        frames = []
        for number in numbers:
            episode.seek(number - 1)
            frames.append(episode.convert("RGB"))
    width, height = frames[0].size
    image = Image.new("RGB", (width, height * len(frames)))
    for row, frame in enumerate(frames):
        image.paste(frame, (0, height * row))
    image.save(path, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit("usage: python benchmarks/stills.py EPISODE.gif IMAGE.png FRAME [FRAME ...]")
    main(sys.argv[1], sys.argv[2], [int(number) for number in sys.argv[3:]])
