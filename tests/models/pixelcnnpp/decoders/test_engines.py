"""Every engine gives the image of the reference, and an independent check certifies it."""

import gc
import sys
import threading
import weakref
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from art_pixeldefend.models.pixelcnnpp import PixelCNNpp
from art_pixeldefend.models.pixelcnnpp.decoders import ENGINES, certify, choose_engine, greedy_decode, sample
from art_pixeldefend.models.pixelcnnpp.decoders.cached import cached_decode
from art_pixeldefend.models.pixelcnnpp.decoders.fixed_point import fixed_point_decode
from art_pixeldefend.models.pixelcnnpp.decoders.incremental import IncrementalNetwork, Memory, memory
from art_pixeldefend.models.pixelcnnpp.decoders.rules import Greedy

ON_A_CPU = [name for name in ENGINES if name != "graphed"]
FAST = [name for name in ON_A_CPU if name != "reference"]
SHAPES = {"grey": (1, 6, 8), "RGB": (3, 6, 5), "two channels": (2, 5, 7), "odd": (1, 7, 5)}


def assert_agree(model, x, eps, method, expected):
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
    assert assert_agree(model, x, eps, method, expected) == 0


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
    assert_agree(model, x, eps, method, greedy_decode(model, x, eps, "reference"))


@pytest.mark.parametrize("method", ON_A_CPU)
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
def test_the_cached_engine_gives_the_same_image_by_rows_and_by_columns(make_model, make_levels, shape, monkeypatch):
    model, x = make_model(shape), torch.from_numpy(make_levels(3, shape))
    images = []
    for small in (0, 3):
        monkeypatch.setattr(memory, "SMALL_BATCH", small)
        images.append(greedy_decode(model, x, 60, "cached"))
    assert torch.equal(*images)


def test_memory_is_freed_with_the_incremental_network(make_model):
    model = make_model((1, 5, 6))
    with torch.no_grad():
        network = IncrementalNetwork(model, Memory(model.network.head.bias, 2))
        network.begin_row(0)
    image = weakref.ref(network.image)
    gc.disable()
    try:
        del network
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
        assert_agree(model, x[:count], 16, method, together[:count])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_agree(model, x[:11], 16, method, together[:11])
    finally:
        torch.set_num_threads(threads)


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
                assert_agree(model, x, eps, method, expected)


@pytest.mark.parametrize("method", FAST)
def test_trained_models_agree_on_digits(digits_model, digits, method):
    x = torch.from_numpy(digits.x_test[:16])
    assert_agree(digits_model, x, 32, method, greedy_decode(digits_model, x, 32, "reference"))


def test_what_is_no_model_and_no_method_is_refused_by_name(make_model, make_levels):
    x = make_levels(1, (1, 8, 8))
    for call, arguments in ((greedy_decode, (x, 16)), (certify, (x, x, 16)), (sample, (1,))):
        with pytest.raises(ValueError, match="pixel_cnn must"):
            call("digits", *arguments)
    for method in ("fast", ["auto"], None):
        with pytest.raises(ValueError, match="method must"):
            greedy_decode(make_model((1, 8, 8)), x, 16, method)


@pytest.mark.parametrize(
    ("method", "change", "lacking"),
    [("graphed", PixelCNNpp.float, "GPU|Triton"), ("compiled", PixelCNNpp.double, "float32")],
)
def test_an_engine_that_cannot_decode_with_a_model_is_refused_and_auto_takes_another(
    make_model, make_levels, method, change, lacking
):
    model, x = change(make_model((1, 5, 5))), torch.from_numpy(make_levels(2, (1, 5, 5)))
    with pytest.raises(ValueError, match=f"method '{method}' needs .*({lacking})"):
        greedy_decode(model, x, 16, method)
    assert choose_engine(model, "auto") != method
    assert_agree(model, x, 16, "auto", greedy_decode(model, x, 16, "reference"))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("layer", ["head", "u_start"])
@pytest.mark.parametrize("method", [*ON_A_CPU, "sample"])
def test_a_model_whose_outputs_are_not_finite_is_refused(make_model, make_levels, method, layer, bad):
    model, x = make_model((3, 4, 5)), torch.from_numpy(make_levels(9, (3, 4, 5)))
    with torch.no_grad():
        getattr(model.network, layer).bias[-1] = bad
    with pytest.raises(ValueError, match="pixel_cnn must give finite outputs"):
        sample(model, 2) if method == "sample" else greedy_decode(model, x, 16, method)


@pytest.mark.parametrize("method", FAST)
def test_threads_that_start_meanwhile_find_the_settings_of_the_process(make_model, make_levels, method):
    model, x = make_model((3, 6, 6)), torch.from_numpy(make_levels(24, (3, 6, 6)))
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    found, finished = set(), threading.Event()

    def watch():
        while not finished.is_set():
            thread = threading.Thread(target=lambda: found.add((torch.get_num_threads(), sys.getswitchinterval())))
            thread.start()
            thread.join()

    torch.set_num_threads(3)
    try:
        watcher = threading.Thread(target=watch)
        watcher.start()
        greedy_decode(model, x, 16, method)
        finished.set()
        watcher.join()
        assert found == {(3, interval)}
        assert (torch.get_num_threads(), sys.getswitchinterval()) == (3, interval)
    finally:
        finished.set()
        torch.set_num_threads(threads)


def test_weights_changed_between_calls_are_seen(make_model, make_levels):
    model = make_model((1, 5, 5))
    x = torch.from_numpy(make_levels(2, model.image_shape))
    for method in ("cached", "compiled"):
        greedy_decode(model, x, 255, method)
        model.network.head.bias.data.add_(0.5)
        assert_agree(model, x, 255, method, greedy_decode(model, x, 255, "reference"))


def test_the_cached_and_the_fixed_point_engine_take_any_rule(make_model, make_levels):
    model = make_model((3, 5, 6))
    x = torch.from_numpy(make_levels(3, model.image_shape))
    with torch.no_grad():
        assert torch.equal(cached_decode(model, x, Greedy(x, 9)), fixed_point_decode(model, x, Greedy(x, 9)))
    assert torch.equal(sample(model, 3, seed=1), sample(model, 3, seed=1))
    assert not torch.equal(sample(model, 3, seed=1), sample(model, 3, seed=2))


def test_the_fixed_point_needs_a_forward_function_and_a_rule_only():
    """A model of another kind: each pixel of a row is predicted to be the one before it, plus 1."""

    class Copy:
        def choose_pixels(self, outputs, pixels, channels):
            return outputs.to(torch.uint8)

    def forward(levels):
        return torch.nn.functional.pad(levels.float() + 1, (1, 0))[..., :-1]

    found = fixed_point_decode(forward, torch.zeros(2, 1, 2, 5, dtype=torch.uint8), Copy())
    assert found.tolist() == [[[[0, 1, 2, 3, 4]] * 2]] * 2
