"""Tiles give the result of the whole image, for every system that works in them, wherever maps lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tests.conftest import formula_image, set_formula_weights
from utils.tiles import Local, Memory, Tiles
from zoo import SYSTEMS, find_system

TILED = [name for name in SYSTEMS if hasattr(find_system(name), "fuse_tiled")]


@pytest.fixture(scope="module")
def systems():
    models = {}
    for name in SYSTEMS:
        torch.manual_seed(0)
        models[name] = find_system(name)().eval()
    for part in models["cddfuse"].published_networks.values():
        set_formula_weights(getattr(models["cddfuse"], part))
    return models


def images(batch, height, width):
    return [torch.cat([formula_image(c + i, height, width) for i in range(batch)]) for c in (0, 2)]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    height=st.integers(15, 32),
    width=st.integers(15, 32),
    pixels=st.integers(60, 900),
    batch=st.integers(1, 2),
)
@example(height=15, width=33, pixels=20, batch=2)
@example(height=17, width=15, pixels=60, batch=1)
@pytest.mark.parametrize("name", TILED)
def test_tiles_of_any_size_give_the_result_of_the_whole_image(systems, name, height, width, pixels, batch):
    model, (vis, ir) = systems[name], images(batch, height, width)
    kept, skip = vis.clone(), model.skips[-1]
    with torch.inference_mode():
        wanted = model.fuse(vis, ir, skip)
        got = model.fuse_tiled(vis, ir, skip, Tiles(pixels))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)  # float32; sums are ordered differently
    assert vis.equal(kept)


@pytest.mark.parametrize("pixels", [1, 3])
def test_tiles_far_below_the_halos(systems, pixels):
    model, (vis, ir) = systems["cddfuse"], images(1, 5, 6)
    with torch.inference_mode():
        got = model.fuse_tiled(vis, ir, "sum", Tiles(pixels))
        torch.testing.assert_close(got, model.fuse(vis, ir, "sum"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TILED)
def test_gradients_are_refused_with_what_to_do(systems, name):
    if name == "mlfuse":
        pytest.skip("works in tiles of its own, which keep gradients")
    with pytest.raises(RuntimeError, match="torch.inference_mode"):
        systems[name].fuse_tiled(*images(1, 20, 20), systems[name].skips[0], Tiles(100))


def test_maps_may_be_written_over_in_place():
    x = torch.randn(2, 3, 17, 23, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(3, 1, 5, 5)
    blur = Local(lambda x: torch.conv2d(x, weight, padding=2, groups=3), halo=2)
    for pixels in (1, 7, 30, 100, 400, 10_000):
        mine = x.clone()
        with torch.no_grad():
            got = Tiles(pixels)(blur, mine, out=mine)
        torch.testing.assert_close(got, blur(x), rtol=0, atol=1e-5)  # sums of 25 floats
        assert pixels >= 2 * 17 * 23 or got is mine


def test_rows_too_long_for_a_tile_are_cut_too():
    rows, columns = Tiles(4096).grid(torch.empty(1, 64, 8333, 12_000, device="meta"))
    for cuts, length in ((rows, 8333), (columns, 12_000)):
        assert cuts[0][0] == 0 and cuts[-1][1] == length
        assert all(a[1] == b[0] for a, b in zip(cuts, cuts[1:], strict=False))
        assert {b - a for a, b in cuts} <= {62, 63, 64}


class Elsewhere(Memory):
    """Some maps lie where no layer can use them, as in host memory for a GPU; here, in another precision."""

    def __init__(self, every):
        self.every, self.made = every, 0

    def new_map(self, shape, like):
        self.made += 1
        return super().new_map(shape, like if self.made % self.every else like.double())

    def fetch(self, tile):
        return tile.float()


class NoMixing(TorchFunctionMode):
    """Refuses operations on maps here and elsewhere, as a GPU does. Tiles may be written to either."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.Tensor.__setitem__ and function is not torch.Tensor.copy_:
            found = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim == 4]
            assert len({x.dtype for x in found}) < 2, function
        return function(*args, **kwargs)


# Both images together are more than a tile, which the encoder cuts. One image, which the decoder sees, is one tile in
# the first case, and more in the others.
@pytest.mark.parametrize(("tiles", "every"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("name", TILED)
def test_a_map_elsewhere_is_fetched_before_it_is_used(systems, name, tiles, every):
    model, (vis, ir) = systems[name], images(1, 40, 48)
    memory, skip = Elsewhere(every), model.skips[0]
    with torch.inference_mode():
        wanted = model.fuse(vis, ir, skip)
        with NoMixing():
            fused = model.fuse_tiled(vis, ir, skip, Tiles(40 * 48 // tiles, memory))
    assert memory.made >= every or name == "mlfuse"
    torch.testing.assert_close(fused, wanted, rtol=0, atol=1e-5)
