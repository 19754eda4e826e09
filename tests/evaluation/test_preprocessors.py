import numpy as np

from art_pixeldefend.evaluation.preprocessors import Sequential, preprocessor


def test_squeezing_is_done_in_turn_and_keeps_the_dtype(tiny):
    x = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32)
    squeeze = preprocessor(tiny.defences["feature-squeezing"])
    assert isinstance(squeeze, Sequential)
    squeezed = squeeze(x)[0]
    first, second = squeeze.steps
    assert squeezed.dtype == np.float32 and np.array_equal(squeezed, second(first(x)[0])[0].astype(np.float32))
    assert len(np.unique(squeezed)) <= 8
    assert np.array_equal(squeeze.estimate_gradient(x, x), x)  # neither is differentiable: the identity
