"""Draws the pictures of docs/layout.md from what `layout.pack_codes` does.

usage: draw_layout.py

Writes docs/img/tile.svg and docs/img/words.svg. Every label is read back from packed codes, so that a picture
can't disagree with the code.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jax_qgemm.formats import layout

FOLDER = Path(__file__).parent.parent / "docs" / "img"
LANE = 5  # the one that is shown in detail: g = 1, t = 1
_COLORS = ("#cfe3f7", "#fbe3c4", "#d5eecf", "#f3d3e3")  # by t
_EDGE = "#444"


def elements(bits: int) -> np.ndarray:
    """Which element of a 16 x 64 tile each field of each word of a plane holds, as 64 * row + column.

    Returns:
      int (words, 32 / bits), fields from the lowest bit up.
    """
    tile = np.arange(layout.TILE_N * layout.TILE_K).reshape(layout.TILE_N, layout.TILE_K)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    found = np.zeros((layout.words_per_tile(bits), len(shifts)), np.int64)
    for i in range(10):
        codes = (tile >> i & 1).astype(np.uint8)
        words = np.asarray(layout.pack_codes(jnp.asarray(codes), bits, 0, layout.TILE_K)).reshape(-1)
        found |= (words[:, None] >> shifts & 1).astype(np.int64) << i
    return found


def lane_of_word(bits: int) -> np.ndarray:
    """Which lane loads each word: up to four consecutive words each, halves of the tile one after the other."""
    vector = min(bits, 4)
    return np.arange(layout.words_per_tile(bits)) // vector % 32


class Drawing:
    def __init__(self, width: int, height: int):
        self.size = width, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, *, bold: bool = False) -> None:
        stroke = f'stroke="{_EDGE}" stroke-width="{2 if bold else 0.5}"'
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" {stroke}/>')

    def text(self, x: float, y: float, text: str, *, size: int = 11, anchor: str = "middle") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{text}</text>')

    def __str__(self) -> str:
        width, height = self.size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        return "\n".join((f'{head} font-family="sans-serif">', *self.parts, "</svg>\n"))


def draw_tile() -> str:
    """The first k-step of a tile: which lane holds each of its 16 x 16 elements."""
    lanes = np.zeros(layout.TILE_N * layout.TILE_K, int)
    lanes[elements(4)] = lane_of_word(4)[:, None]
    lanes = lanes.reshape(layout.TILE_N, layout.TILE_K)
    cell, left, top = 30, 60, 50
    drawing = Drawing(left + 16 * cell + 20, top + 16 * cell + 10)
    drawing.text(left + 8 * cell, 16, "k (one step of 16; the other three steps of the tile repeat it)", size=13)
    drawing.text(8, top - 8, "row of n", size=13, anchor="start")
    for column in range(16):
        drawing.text(left + (column + 0.5) * cell, top - 8, str(column))
    for row in range(16):
        drawing.text(left - 10, top + (row + 0.65) * cell, str(row), anchor="end")
        for column in range(16):
            x, y, lane = left + column * cell, top + row * cell, int(lanes[row, column])
            drawing.box(x, y, cell, cell, _COLORS[lane % 4])
            drawing.text(x + cell / 2, y + 0.65 * cell, str(lane))
    for row, column in zip(*np.nonzero(lanes[:, :16] == LANE), strict=True):
        drawing.box(left + column * cell, top + row * cell, cell, cell, "none", bold=True)
    return str(drawing)


def draw_words() -> str:
    """The first word of one lane in planes of 4, 2, 1 and 8 bits, highest bits on the left."""
    bit, left, height = 27, 62, 34
    drawing = Drawing(left + 32 * bit + 10, 4 * (height + 40) + 10)
    for i, bits in enumerate((4, 2, 1, 8)):
        top = 30 + i * (height + 40)
        word = int(np.flatnonzero(lane_of_word(bits) == LANE)[0])
        drawing.text(8, top + 21, f"{bits} bit{'s' * (bits > 1)}", size=13, anchor="start")
        for field, element in enumerate(elements(bits)[word]):
            row, column = divmod(int(element), layout.TILE_K)
            width = bits * bit
            x = left + 32 * bit - (field + 1) * width
            run = 2 * (column // 16) + row // 8
            drawing.box(x, top, width, height, _COLORS[run % 4])
            drawing.text(x + width / 2, top + 14, f"n {row}" if bits > 1 else str(row))
            drawing.text(x + width / 2, top + 28, f"k {column}" if bits > 1 else str(column))
        for byte in range(4):
            x = left + 32 * bit - (byte + 1) * 8 * bit
            drawing.box(x, top, 8 * bit, height, "none", bold=True)
            drawing.text(x + 4 * bit, top - 6, f"byte {byte}", size=10)
    return str(drawing)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, picture in (("tile.svg", draw_tile()), ("words.svg", draw_words())):
        (FOLDER / name).write_text(picture)
        print(f"wrote {FOLDER / name}")


if __name__ == "__main__":
    main()
