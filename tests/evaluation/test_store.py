import numpy as np

from art_pixeldefend.evaluation.store import Store, digest


def test_the_key_of_settings_does_not_depend_on_their_order():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_stored_images_come_back_as_they_were(tmp_path):
    kept, rng = Store(tmp_path), np.random.default_rng(0)
    on_grid = (rng.integers(0, 256, (2, 1, 4, 4)) / 255).astype(np.float32)
    off_grid = rng.random((2, 1, 4, 4), dtype=np.float32)
    for name, images in (("on", on_grid), ("off", off_grid)):
        first = kept.images("x", {"name": name}, lambda images=images: images)
        again = kept.images("x", {"name": name}, lambda: 1 / 0)
        assert np.array_equal(first, images) and np.array_equal(again, images)
