import numpy as np
import pytest
import torch
from art.defences.preprocessor import SpatialSmoothing
from torch.nn import functional as F

from art_pixeldefend.evaluation.preprocessors import MedianSmoothing, Sequential, preprocessor


def test_squeezing_is_done_in_turn_and_keeps_the_dtype(tiny):
    x = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32)
    squeeze = preprocessor(tiny.defences["feature-squeezing"])
    assert isinstance(squeeze, Sequential)
    squeezed = squeeze(x)[0]
    first, second = squeeze.steps
    assert squeezed.dtype == np.float32 and np.array_equal(squeezed, second(first(x)[0])[0].astype(np.float32))
    assert len(np.unique(squeezed)) <= 8


def test_the_gradient_of_squeezing_is_that_of_the_median_of_the_rounded_pixels(tiny):
    x, grad = np.random.default_rng(0).random((2, 3, 1, 8, 8), dtype=np.float32)
    squeeze = preprocessor(tiny.defences["feature-squeezing"])
    rounded, median = squeeze.steps
    expected = median.estimate_gradient(rounded(x)[0], grad)
    assert not np.array_equal(expected, grad)
    assert np.array_equal(squeeze.estimate_gradient(x, grad), expected)


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_gradient_of_the_median_is_that_of_sorting(size, channels_first):
    rng = np.random.default_rng(size)
    x = rng.permutation(np.linspace(0, 1, 2 * 3 * 7 * 6)).reshape(2, 3, 7, 6)  # no two pixels are equal
    grad = rng.standard_normal(x.shape)
    channels = (0, 1, 2, 3) if channels_first else (0, 2, 3, 1)
    smoothing = MedianSmoothing(window_size=size, channels_first=channels_first)
    leaf = torch.tensor(x, requires_grad=True)
    # SciPy's "reflect" repeats the border, which no mode of torch's padding does.
    before, after = size // 2, (size - 1) // 2
    padded = leaf
    for axis in (2, 3):
        length = x.shape[axis]
        ids = [*range(before - 1, -1, -1), *range(length), *range(length - 1, length - 1 - after, -1)]
        padded = padded.index_select(axis, torch.tensor(ids))
    windows = F.unfold(padded.flatten(0, 1)[:, None], size)  # (N C, size^2, H W)
    median = windows.sort(dim=1).values[:, size**2 // 2].reshape(x.shape)
    median.backward(torch.tensor(grad))
    assert np.array_equal(smoothing(x.transpose(channels))[0], median.detach().numpy().transpose(channels))
    found = smoothing.estimate_gradient(x.transpose(channels), grad.transpose(channels))
    np.testing.assert_allclose(found, leaf.grad.numpy().transpose(channels), atol=1e-12)


def test_class_gradients_go_through_the_median_one_by_one():
    rng = np.random.default_rng(0)
    x, grads = rng.random((2, 1, 6, 5)), rng.standard_normal((2, 3, 1, 6, 5))
    smoothing = MedianSmoothing(window_size=2, channels_first=True)
    found = smoothing.estimate_gradient(x, grads)
    for k in range(3):
        assert np.array_equal(found[:, k], smoothing.estimate_gradient(x, grads[:, k]))


def test_equal_pixels_share_the_gradient_of_the_median():
    smoothing = MedianSmoothing(window_size=2, channels_first=True)
    x, grad = np.full((1, 1, 4, 4), 0.5, np.float32), np.zeros((1, 1, 4, 4), np.float32)
    grad[0, 0, 2, 2] = 1
    expected = np.zeros_like(x)
    expected[0, 0, 1:3, 1:3] = 0.25
    found = smoothing.estimate_gradient(x, grad)
    assert found.dtype == np.float32 and np.array_equal(found, expected)


def test_the_gradient_of_the_median_of_values_out_of_range_is_finite():
    smoothing = MedianSmoothing(window_size=2, channels_first=True, clip_values=(0, 1))
    x = np.full((1, 1, 3, 3), 1.5, np.float32)
    assert smoothing.estimate_gradient(x, np.ones_like(x)).sum() == 9


def test_median_smoothing_smooths_as_art_does():
    x = np.random.default_rng(0).integers(0, 8, (4, 3, 9, 8)).astype(np.float32) / 7
    mine, theirs = (kind(window_size=2, channels_first=True) for kind in (MedianSmoothing, SpatialSmoothing))
    assert np.array_equal(mine(x)[0], theirs(x)[0])
