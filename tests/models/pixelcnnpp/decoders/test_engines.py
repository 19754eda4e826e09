"""Every engine gives the image of the reference, and a plain pass certifies it."""

import gc
import os
import platform
import subprocess
import sys
import threading
import weakref
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders import (
    ENGINES,
    cached,
    certify,
    decode,
    fixed_point,
    greedy_decode,
    sample,
)
from art_pixeldefend.models.pixelcnnpp.decoders.cached import rows
from art_pixeldefend.models.pixelcnnpp.decoders.cached.walk import Walk
from art_pixeldefend.models.pixelcnnpp.decoders.rules import Greedy

FAST = [name for name in ENGINES if name != "reference"]
SHAPES = {"grey": (1, 6, 8), "RGB": (3, 6, 5), "two channels": (2, 5, 7), "odd": (1, 7, 5)}


def agree(model, x, eps, method, expected):
    """Equal but for sub-pixels where rounding decides; an image with such a tie may differ from there on."""
    found = greedy_decode(model, x, eps, method)
    certificate = certify(model, x, found, eps)
    assert certificate.exact.all()
    differs = (found != expected).flatten(1).any(dim=1)
    tied = certificate.ties + certify(model, x, expected, eps).ties > 0
    assert not (differs & ~tied).any()
    return int(differs.sum())


@cache
def reference(make_model, make_levels, shape, eps):
    model, x = make_model(shape), torch.from_numpy(make_levels(3, shape))
    return model, x, greedy_decode(model, x, eps, "reference")


@pytest.mark.parametrize("method", FAST)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("eps", [0, 1, 16, 255])
def test_engines_give_the_image_of_the_reference(make_model, make_levels, shape, eps, method):
    model, x, expected = reference(make_model, make_levels, shape, eps)
    assert agree(model, x, eps, method, expected) == 0


@pytest.mark.parametrize("method", FAST)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_engines_agree_on_any_model_and_image(method, data):
    sizes = st.integers(1, 9)
    shape = data.draw(st.tuples(st.integers(1, 4), sizes, sizes), "shape")
    seed = data.draw(st.integers(0, 999), "seed")
    torch.manual_seed(seed)
    model = PixelCNNpp(
        shape, data.draw(st.integers(1, 20), "filters"), data.draw(st.integers(1, 2), "resnets"), 1 + seed % 4
    ).eval()
    x = torch.randint(0, 256, (data.draw(st.integers(0, 5), "batch"), *shape), dtype=torch.uint8)
    eps = data.draw(st.integers(0, 255), "eps")
    agree(model, x, eps, method, greedy_decode(model, x, eps, "reference"))


@pytest.mark.parametrize("method", ENGINES)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", [(1, 5, 6), (3, 4, 5)])
def test_the_input_stays_as_it_is_and_the_output_is_not_part_of_it(make_model, make_levels, shape, count, method):
    model, x = make_model(shape), torch.from_numpy(make_levels(count, shape))
    before = x.clone()
    purified = greedy_decode(model, x, 60, method)
    assert not torch.equal(purified, x)
    assert torch.equal(x, before)
    purified += 1
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_and_pixels_of_the_cached_engine_give_the_same_image(make_model, make_levels, shape, monkeypatch):
    model, x = make_model(shape), torch.from_numpy(make_levels(3, shape))
    images = []
    for few in (0, 3):  # pixel by pixel, row by row; memory is laid out accordingly
        monkeypatch.setattr(rows, "FEW", few)
        images.append(greedy_decode(model, x, 60, "cached"))
    assert torch.equal(*images)


def test_the_cached_engines_memory_is_free_when_the_walk_is_over(make_model):
    walk = Walk(make_model((1, 5, 6)), 2)
    image = weakref.ref(walk.image)
    gc.disable()
    try:
        del walk
        assert image() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["cached", "compiled"])
def test_batch_sizes_and_thread_counts_give_the_same_images(make_model, make_levels, method):
    model = make_model((1, 5, 6))
    x = torch.from_numpy(make_levels(300, model.image_shape))
    together = greedy_decode(model, x, 16, method, batch_size=300)
    assert certify(model, x, together, 16).exact.all()
    for count in (1, 2, 7):
        agree(model, x[:count], 16, method, together[:count])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        agree(model, x[:11], 16, method, together[:11])
    finally:
        torch.set_num_threads(threads)


def test_the_compiled_engine_gives_an_image_the_same_bits_in_any_company(make_model, make_levels):
    model = make_model((3, 6, 6))
    x = torch.from_numpy(make_levels(9, model.image_shape))
    together = greedy_decode(model, x, 40, "compiled")
    alone = torch.cat([greedy_decode(model, image[None], 40, "compiled") for image in x])
    assert torch.equal(together, alone)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_crew_gives_the_bits_of_one_walker(data):
    size = st.integers(1, 11)
    shape = data.draw(st.tuples(st.integers(1, 3), size, size), "shape")
    torch.manual_seed(data.draw(st.integers(0, 999), "seed"))
    model = PixelCNNpp(
        shape, data.draw(st.integers(1, 40), "filters"), data.draw(st.integers(1, 2), "resnets"), 3
    ).eval()
    x = torch.randint(0, 256, (1, *shape), dtype=torch.uint8)
    images = {}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            images[count] = greedy_decode(model, x, 60, "compiled")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(images[1], images[2])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system lets no thread choose its cores")
@pytest.mark.parametrize("filters, shape", [(8, (1, 9, 9)), (72, (3, 6, 5))], ids=["narrow", "wide"])
def test_a_crew_on_one_core_gives_the_same_bits(make_model, make_levels, filters, shape):
    """Each member then stops in the middle of its work, and other pieces are left to be shared out."""
    model = make_model(shape, filters=filters, resnets=1)
    x = torch.from_numpy(make_levels(1, shape))
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    images = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            images.append(greedy_decode(model, x, 60, "compiled"))
        os.sched_setaffinity(0, {min(cores)})
        images += [greedy_decode(model, x, 60, "compiled") for _ in range(3)]
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
    assert all(torch.equal(image, images[0]) for image in images[1:])


@pytest.mark.parametrize("filters, resnets, mixtures", [(16, 1, 10), (17, 3, 1), (40, 1, 5), (72, 1, 2)])
def test_the_compiled_engine_takes_any_width_and_depth(make_model, make_levels, filters, resnets, mixtures):
    model = make_model((1, 6, 6), filters=filters, resnets=resnets, mixtures=mixtures)
    x = torch.from_numpy(make_levels(6, model.image_shape))
    agree(model, x, 20, "compiled", greedy_decode(model, x, 20, "fixed-point"))


@pytest.mark.parametrize("log_scale, mean", [(-7.0, 0.3), (-7.0, 50.0), (-7.0, -50.0), (14.0, 0.0), (-3.0, 1e5)])
def test_extreme_mixtures_make_no_ties_in_the_tails(make_levels, log_scale, mean):
    """Components hundreds of scales away: masses underflow, their order must not."""
    torch.manual_seed(0)
    model = PixelCNNpp((1, 4, 4), filters=4, resnets=1, mixtures=2).eval()
    with torch.no_grad():
        model.network.head.gain.fill_(0.01)
        model.network.head.bias.copy_(torch.tensor([0.0, 0.5, mean, mean + 0.01, log_scale, log_scale]))
    x = torch.from_numpy(make_levels(2, model.image_shape))
    for eps in (3, 255):
        expected = greedy_decode(model, x, eps, "reference")
        for method in FAST:
            if log_scale == 14:  # flat to the last bit: which level wins is rounding, and all of them are right
                assert certify(model, x, greedy_decode(model, x, eps, method), eps).exact.all()
            else:
                agree(model, x, eps, method, expected)


@pytest.mark.parametrize("method", FAST)
def test_trained_models_agree_on_digits(digits_model, digits, method):
    x = torch.from_numpy(digits.x_test[:16])
    agree(digits_model, x, 32, method, greedy_decode(digits_model, x, 32, "reference"))


def test_what_is_no_model_and_no_method_is_refused_by_name(make_model, make_levels):
    x = make_levels(1, (1, 8, 8))
    for call, arguments in ((greedy_decode, (x, 16)), (certify, (x, x, 16)), (sample, (1,))):
        with pytest.raises(ValueError, match="pixel_cnn must"):
            call("digits", *arguments)
    for method in ("fast", ["auto"], None):
        with pytest.raises(ValueError, match="method must"):
            greedy_decode(make_model((1, 8, 8)), x, 16, method)


def test_walks_do_not_begin_where_not_all_their_threads_can_be_had(monkeypatch):
    """Members of a crew wait for one another: one that is alone would wait for ever."""
    from art_pixeldefend.models.pixelcnnpp.decoders.compiled import engine

    started, begun, start = [], [], threading.Thread.start

    def start_one(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(RuntimeError, match="can't start"):
        engine._run([lambda: begun.append(None)] * 4, 4)
    assert started and not begun


def test_without_numba_the_torch_engine_takes_over(make_model, make_levels, monkeypatch):
    model = make_model((1, 5, 5))
    x = make_levels(3, model.image_shape)
    expected = greedy_decode(model, x, 16, "compiled")
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it raises ImportError
    decode.has_numba.cache_clear()
    try:
        assert not decode.has_numba()
        for method in ("compiled", "auto"):
            np.testing.assert_array_equal(greedy_decode(model, x, 16, method), expected)
    finally:
        decode.has_numba.cache_clear()


def test_the_compiled_engine_gives_the_same_image_without_wide_vectors(make_model, make_levels, tmp_path):
    """A process that compiles for a processor with AVX2 (or, elsewhere, none of it) and no AVX-512."""
    model = make_model((3, 5, 6))
    model.save(tmp_path / "model.safetensors")
    np.save(tmp_path / "x.npy", make_levels(3, model.image_shape))
    code = (
        "import sys, numpy as np\n"
        "from art_pixeldefend import PixelCNNpp, greedy_decode\n"
        "from art_pixeldefend.models.pixelcnnpp.decoders.compiled.vectors import LANES\n"
        "assert LANES == 8\n"
        "model = PixelCNNpp.load(sys.argv[1] + '/model.safetensors')\n"
        "x = np.load(sys.argv[1] + '/x.npy')\n"
        "np.save(sys.argv[1] + '/purified.npy', greedy_decode(model, x, 60, 'compiled'))\n"
    )
    x86 = platform.machine() in ("x86_64", "AMD64")
    features = "+sse4.2,+avx,+avx2,+fma" if x86 else ""
    wide = {"NUMBA_CPU_NAME": "haswell" if x86 else "generic", "NUMBA_CPU_FEATURES": features}
    env = os.environ | wide | {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=env)
    x, found = (torch.from_numpy(np.load(tmp_path / f"{name}.npy")) for name in ("x", "purified"))
    assert torch.equal(found, greedy_decode(model, x, 60, "fixed-point"))


def test_double_precision_models_are_left_to_torch(make_model, make_levels):
    model = make_model((1, 5, 5)).double()
    x = torch.from_numpy(make_levels(2, model.image_shape))
    agree(model, x, 16, "compiled", greedy_decode(model, x, 16, "reference"))


def test_weights_changed_between_calls_are_seen(make_model, make_levels):
    model = make_model((1, 5, 5))
    x = torch.from_numpy(make_levels(2, model.image_shape))
    for method in ("cached", "compiled"):
        greedy_decode(model, x, 255, method)
        model.network.head.bias.data.add_(0.5)
        agree(model, x, 255, method, greedy_decode(model, x, 255, "reference"))


@pytest.mark.parametrize("many", [0, 1 << 40], ids=["two threads", "one thread"])
def test_the_fingerprint_sees_a_change_of_any_parameter_and_no_thread_count(make_model, many, monkeypatch):
    from art_pixeldefend.models.pixelcnnpp.decoders.compiled import fingerprint as module

    model = make_model((1, 5, 5))
    expected = module.fingerprint(model)
    monkeypatch.setattr(module, "MANY", many)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert module.fingerprint(model) == expected
        for parameter in model.parameters():
            parameter.data.view(-1)[-1] += 1.0
            changed = module.fingerprint(model)
            assert changed != expected
            expected = changed
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("count", [1, 2])
def test_no_engine_writes_to_its_input(make_model, make_levels, count):
    model = make_model((1, 5, 5))
    x = torch.from_numpy(make_levels(count, model.image_shape))
    before = x.clone()
    for method in ENGINES:
        greedy_decode(model, x, 255, method)
        assert torch.equal(x, before)


def test_the_cached_engine_takes_any_rule(make_model, make_levels):
    model = make_model((3, 5, 6))
    x = torch.from_numpy(make_levels(3, model.image_shape))
    with torch.no_grad():
        assert torch.equal(cached.decode(model, x, Greedy(x, 9)), fixed_point.decode(model, x, Greedy(x, 9)))
    assert torch.equal(sample(model, 3, seed=1), sample(model, 3, seed=1))
    assert not torch.equal(sample(model, 3, seed=1), sample(model, 3, seed=2))
