"""Images to [0, 1] and to levels, and back: ranges, arrays of clip values, layouts, dtypes, memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from art_pixeldefend import levels as module
from art_pixeldefend.levels import Images, as_tensor, check_clip_values, from_levels, to_levels

RANGES = [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0), (-0.5, 2.5)]
ranges = st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3)).map(lambda ends: (ends[0], ends[0] + ends[1]))
ALL = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
SHAPE = (2, 3, 4)


def largest_allocation(work):
    """Bytes of the largest tensor that the work makes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    return max((event.self_cpu_memory_usage for event in recorded.events()), default=0)


# Levels of arrays and tensors


@given(ranges)
@settings(deadline=None)
def test_levels_survive_the_way_to_values_and_back(clip_values):
    for dtype in (np.float32, np.float64):
        if clip_values[1] - clip_values[0] > 1e-4 * abs(clip_values[0]):  # float32 tells the levels apart
            np.testing.assert_array_equal(to_levels(from_levels(ALL, clip_values, dtype), clip_values), ALL)


@given(st.lists(st.floats(-3, 4, width=32), min_size=1), ranges)
@settings(deadline=None)
def test_a_value_goes_to_the_nearest_level_in_the_range(values, clip_values):
    low, high = clip_values
    x = np.array(values) * (high - low) + low
    levels = to_levels(x, clip_values).astype(np.float64)
    inside = np.clip(x, low, high)
    assert (np.abs(from_levels(levels, clip_values, np.float64) - inside) <= 0.5001 * (high - low) / 255).all()


@pytest.mark.parametrize("clip_values", RANGES)
def test_arrays_and_tensors_are_converted_alike(clip_values):
    x = np.random.default_rng(0).uniform(-2, 300, (5, *SHAPE)).astype(np.float32)
    levels = to_levels(x, clip_values)
    assert levels.dtype == np.uint8
    assert torch.equal(to_levels(torch.from_numpy(x), clip_values), torch.from_numpy(levels))
    for dtype, theirs in ((np.float32, torch.float32), (np.float64, torch.float64), (np.int64, torch.int64)):
        values = from_levels(levels, clip_values, dtype)
        assert values.dtype == dtype
        assert torch.equal(from_levels(torch.from_numpy(levels), clip_values, theirs), torch.from_numpy(values))


@pytest.mark.parametrize("dtype", ["float16", ">f4", "longdouble", "uint16", "int8", "uint32"])
def test_any_real_dtype_makes_a_tensor_of_its_values(dtype):
    x = np.arange(6).astype(dtype)
    x.flags.writeable = False
    np.testing.assert_array_equal(as_tensor(x).double().numpy(), np.arange(6))


@pytest.mark.parametrize("x", [np.zeros(2, complex), np.array(["a"]), np.array([None]), [[1.0], [1.0, 2.0]], [True]])
def test_what_is_not_an_array_of_numbers_is_refused(x):
    with pytest.raises(ValueError, match=r"^x must be an array of numbers"):
        as_tensor(x)


# Images


@pytest.mark.parametrize("clip_values", RANGES)
@pytest.mark.parametrize("nhwc", [False, True])
def test_levels_and_values_are_those_of_the_formula_however_large_the_pieces(clip_values, nhwc, monkeypatch):
    """70 images in pieces of one image and of thirty; for doubles the formula holds to the last bit."""
    shape, (low, high) = (3, 5, 4), clip_values
    levels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (70, *shape), dtype=np.uint8))
    exact = levels.double() / 255 * (high - low) + low
    x = exact.movedim(1, -1) if nhwc else exact
    outside = x.clone()
    outside[65] = high + 1
    for piece in (1, 30 * 60, module.PIECE):
        monkeypatch.setattr(module, "PIECE", piece)
        images = Images(shape, clip_values)
        assert torch.equal(images.to_levels(x), levels)
        assert torch.equal(images.from_levels(levels, like=x), x)
        with pytest.raises(ValueError, match=r"x must be within clip_values"):
            images.to_levels(outside)


def test_bytes_are_levels_in_their_own_range_only():
    x = torch.arange(50, dtype=torch.uint8).reshape(2, 1, 5, 5)
    for high, factor in ((255, 1), (51, 5)):
        assert torch.equal(Images((1, 5, 5), (0, high)).to_levels(x), factor * x)


def test_converting_needs_memory_for_the_result_and_a_piece(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1000)
    x = torch.zeros((50, 1, 40, 40))
    allocated = largest_allocation(lambda: Images((1, 40, 40), (0, 1)).to_levels(x))
    assert allocated <= x.numel()  # a byte a value: one double more for each would be eight
    bytes_ = x.byte()
    assert largest_allocation(lambda: Images((1, 40, 40), (0, 255)).to_levels(bytes_)) == 0


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("clip_values", [*RANGES, (np.array([-1.0, 0.0]), np.array([1.0, 5.0]))])
def test_images_in_0_to_1_survive_the_way_out_and_back(clip_values, nhwc):
    unit = torch.rand(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    like = unit.movedim(1, -1) if nhwc else unit
    images = Images(SHAPE, clip_values)
    values = images.from_unit(unit, like)
    assert values.shape == like.shape
    torch.testing.assert_close(images.to_unit(values), unit, rtol=0, atol=1e-12)
    low, high = (torch.as_tensor(end, dtype=torch.float64) for end in clip_values)
    channels_last = values if nhwc else values.movedim(1, -1)
    torch.testing.assert_close((channels_last - low) / (high - low), unit.movedim(1, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip_values", [(0.0, 1.0), (np.zeros((2, 1, 1)), np.array([[[1.0]], [[9.0]]]))])
def test_the_ends_of_the_range_are_0_and_1_in_float32_too(clip_values):
    images, like = Images(SHAPE, clip_values), torch.zeros(1, *SHAPE)
    for end in (0.0, 1.0):
        assert (images.to_unit(images.from_unit(torch.full((1, *SHAPE), end), like)) == end).all()


@pytest.mark.parametrize("size", [(2,), (2, 1, 1), SHAPE])
def test_images_normalised_channel_by_channel_have_arrays_of_clip_values(size):
    mean, std = np.array([0.3, 0.6]), np.array([0.2, 0.5])
    ends = [(end - mean) / std for end in (0, 1)]
    ends = [end[:, None, None] for end in ends] if len(size) == 3 else ends
    clip_values = check_clip_values([np.broadcast_to(end, size) for end in ends])
    levels = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    x = (levels / 255 - mean[:, None, None]) / std[:, None, None]
    images = Images(SHAPE, clip_values)
    assert torch.equal(images.to_levels(torch.from_numpy(x)), torch.from_numpy(levels))
    assert not images.check(torch.from_numpy(x))
    x[2, 1, 0, 0] = (1.01 - mean[1]) / std[1]  # in the other channel's range
    assert images.check(torch.from_numpy(x))


def test_arrays_of_one_value_are_numbers():
    assert check_clip_values((np.zeros((3, 1, 1)), np.ones((3, 1, 1), np.float32))) == (0.0, 1.0)
    assert check_clip_values(np.array([-1, 1])) == (-1.0, 1.0)


@pytest.mark.parametrize(
    "clip_values",
    [
        (1, 0), (0, 0), (0, np.inf), (np.nan, 1), None, (0, 1, 2), ("a", "b"), 1, ([], []),
        (np.zeros(3), np.array([1.0, 0.0, 1.0])), (np.zeros(3), np.ones(2)),
    ],
)  # fmt: skip
def test_impossible_clip_values_are_refused(clip_values):
    with pytest.raises(ValueError, match=r"^clip_values must"):
        check_clip_values(clip_values)


@pytest.mark.parametrize("size", [3, (2, 1), (1, 1, 2)])
def test_arrays_that_do_not_fit_an_image_are_refused(size):
    clip_values = (np.zeros(size), np.arange(1, 1 + np.prod(size)).reshape(size))
    with pytest.raises(ValueError, match=r"^clip_values of shapes"):
        Images(SHAPE, clip_values).check(torch.zeros(1, *SHAPE))


@given(st.floats(-30, 30, width=32), st.sampled_from(RANGES))
@settings(deadline=None)
def test_values_up_to_half_a_level_outside_are_inside_and_those_ten_ranges_away_are_no_images(value, clip_values):
    low, high = clip_values
    x = torch.full((2, *SHAPE), low, dtype=torch.float64)
    x[1, 1, 2, 3] = low + value * (high - low)
    images = Images(SHAPE, clip_values)
    distance = max(-value, value - 1)
    if distance > 10.001:
        with pytest.raises(ValueError, match=r"^x must be within clip_values"):
            images.check(x)
    elif distance < 9.999 and abs(distance - 0.5 / 255) > 1e-6:
        assert bool(images.check(x)) == (distance > 0.5 / 255)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clip_values", [(0.0, 1.0), (np.zeros(2), np.array([1.0, 2.0]))])
def test_nan_and_infinity_are_refused(value, clip_values):
    x = torch.zeros(2, *SHAPE)
    x[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match="x must be finite"):
        Images(SHAPE, clip_values).check(x)


@pytest.mark.parametrize("x", [torch.zeros(1, *SHAPE, dtype=torch.bool), torch.zeros(1, *SHAPE, dtype=torch.complex64)])
def test_tensors_that_hold_no_real_numbers_are_refused(x):
    with pytest.raises(ValueError, match="x must hold real numbers"):
        Images(SHAPE).check(x)


@pytest.mark.parametrize("shape", [SHAPE, (1, 3, 4), (1, 2, 3), (1, 1, *SHAPE), ()])
def test_tensors_of_another_shape_are_refused(shape):
    for images in (Images(SHAPE), Images(None)):
        if not (images.image_shape is None and len(shape) == 4):
            with pytest.raises(ValueError, match="x must be of shape"):
                images.check(torch.zeros(shape))
