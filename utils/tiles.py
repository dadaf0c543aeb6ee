"""A network over an image in tiles, with the result of the whole image up to rounding. Needs torch alone.

    tiles = Tiles(pixels=16384)
    x = tiles(block, x, out=x)

A block is a function of maps (B, C, H, W) with an attribute `halo`: how many pixels beside a tile it looks at. A block
that looks at the whole image does so through sums over pixels. It has three methods instead: `sums(*tile, inside)`, a
tuple of what is to be added up over the tiles, of the pixels `inside` a tile; `context(*sums)`; and
`local(*tile, context)`, the rest.

A tile that stays in the cache of a processor is faster than an image that does not, and takes less memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Cuts = list[tuple[int, int]]
Place = tuple[slice, slice]  # rows and columns
Inside = tuple[Any, slice, slice]  # the pixels of a tile without its halo, as an index


class Memory:
    """Where whole maps live between two sweeps over an image. This one keeps them in memory.

    A sub-class may put them elsewhere: `fetch` then brings a tile of a map to where it is worked on.
    """

    def new_map(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An empty map (B, C, H, W) in channels-last memory, of the dtype of `like`."""
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)

    def fetch(self, tile: Tensor) -> Tensor:
        return tile

    def row_done(self) -> None:
        """Called whenever a row of tiles has been worked on."""


class Local(NamedTuple):
    """A function of maps as a block."""

    function: Callable[..., Tensor]
    halo: int

    def __call__(self, *tile: Tensor) -> Tensor:
        return self.function(*tile)


class Tiles:
    """Runs blocks over images in tiles.

    Args:
        pixels: of a tile, over all images of a batch; 0 for the whole image.
        memory: where maps live.
    """

    def __init__(self, pixels: int, memory: Memory | None = None) -> None:
        self.pixels, self.memory = pixels, memory or Memory()

    def __call__(self, block: Any, *maps: Tensor, out: Tensor | None = None) -> Tensor:
        """block(*maps).

        Args:
            block: as above.
            maps: (B, C, H, W) each, of one batch, height and width.
            out: a map of the result's shape that may be written over, one of `maps` for instance. Take the result from
                the return value.

        Raises:
            RuntimeError: gradients are enabled. Tiles are for inference; with gradients call the network itself.
        """
        return self.merged(_itself, (block, *maps), out=out)

    def merged(self, merge: Callable[..., Tensor], *parts: Sequence[Any], out: Tensor | None = None) -> Tensor:
        """merge(block(*maps), ...) of parts (block, *maps), in one sweep: what parts make is never whole.

        Args:
            merge: the results of the parts -> (B, C', H, W), pixel by pixel.
            parts: a block and its maps each.
            out: as of a call.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "tiles are for inference: use torch.inference_mode() or torch.no_grad(), or call the network itself"
            )
        height, width = parts[0][1].shape[2:]
        functions = [self._local(block, maps) for block, *maps in parts]
        sweeps = [self._sweep(block.halo, maps, out) for block, *maps in parts]
        for tiles in zip(*sweeps, strict=True):
            rows, columns = tiles[0][0]
            piece = merge(*(f(*tile)[inside] for f, (_, tile, inside) in zip(functions, tiles, strict=True)))
            if piece.shape[2:] == (height, width):
                return piece
            if out is None:
                out = self.memory.new_map((*piece.shape[:2], height, width), piece)
            out[:, :, rows, columns] = piece
        return out

    def sums(self, block: Any, *maps: Tensor) -> list[Tensor]:
        """block.sums over the whole image."""
        totals: list[Tensor] = []
        for _, tile, inside in self._sweep(block.halo, maps, None):
            part = block.sums(*tile, inside)
            if not totals:
                totals = [torch.zeros_like(x, dtype=dtype_of_sums(x.device)) for x in part]
            for total, x in zip(totals, part, strict=True):
                total += x
        return totals

    def _local(self, block: Any, maps: Sequence[Tensor]) -> Callable[..., Tensor]:
        if not hasattr(block, "sums"):
            return block
        context = block.context(*self.sums(block, *maps))

        def local(*tile: Tensor) -> Tensor:
            return block.local(*tile, context)

        return local

    def _sweep(
        self, halo: int, maps: Sequence[Tensor], out: Tensor | None
    ) -> Iterator[tuple[Place, list[Tensor], Inside]]:
        """The place of each tile, its maps with their halo, and the index of the tile in them.

        A tile may be written to its place in `out` as soon as it is there, even where `out` is one of the maps.
        """
        row_cuts, column_cuts = self.grid(maps[0])
        above: list[Tensor | None] = [None] * len(maps)  # rows of a map as they were before they were written over
        for top, bottom in row_cuts:
            first = max(top - halo, 0)
            bands = []
            for i, x in enumerate(maps):
                band = x[:, :, first : bottom + halo]
                if halo and out is not None and len(row_cuts) * len(column_cuts) > 1 and _share_memory(x, out):
                    band = band.clone(memory_format=torch.channels_last)
                    if above[i] is not None:
                        band[:, :, : top - first] = above[i]
                    above[i] = band[:, :, max(bottom - halo, 0) - first : bottom - first].clone()
                bands.append(band)
            for left, right in column_cuts:
                start = max(left - halo, 0)
                # Pixels near an inner edge see padding in place of their neighbours; they belong to another tile.
                inside = (..., slice(top - first, bottom - first), slice(left - start, right - start))
                tile = [self.memory.fetch(band[..., start : right + halo]) for band in bands]
                yield (slice(top, bottom), slice(left, right)), tile, inside
            del bands, band
            self.memory.row_done()

    def grid(self, x: Tensor) -> tuple[Cuts, Cuts]:
        """Ranges of rows and of columns that cut `x` into tiles: as square as it takes to have little halo."""
        batch, _, height, width = x.shape
        pixels = max(1, self.pixels // batch)
        if not self.pixels or height * width <= pixels:
            return [(0, height)], [(0, width)]
        rows = max(1, math.isqrt(pixels), pixels // width)
        return _cut(height, rows), _cut(width, max(1, pixels // rows))


def dtype_of_sums(device: torch.device) -> torch.dtype:
    """Of sums over thousands of tiles. Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _itself(x: Tensor) -> Tensor:
    return x


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _cut(length: int, most: int) -> Cuts:
    parts = -(-length // most)
    edges = [length * i // parts for i in range(parts + 1)]
    return list(zip(edges, edges[1:], strict=False))
