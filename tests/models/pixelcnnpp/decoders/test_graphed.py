"""Without a GPU, the engine under Triton's interpreter, which works on a CPU; without Triton, nothing."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from art_pixeldefend.models.pixelcnnpp.decoders import certify, choose_engine, decode, greedy_decode

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.skipif(not decode.has_triton() or torch.cuda.is_available(), reason="no Triton, or it compiles")
@pytest.mark.parametrize("iterated", [64, 0], ids=["by iteration", "by columns"])
@pytest.mark.parametrize(("shape", "count", "eps"), [((1, 9, 2), 1, 16), ((3, 2, 2), 2, 255)])
def test_interpreted_kernels_give_the_image_of_the_reference(
    make_model, make_levels, monkeypatch, shape, count, eps, iterated
):
    from art_pixeldefend.models.pixelcnnpp.decoders import graphed

    monkeypatch.setattr(graphed.capture, "ITERATED", iterated)
    model, x = make_model(shape), torch.from_numpy(make_levels(count, shape))
    before, expected = x.clone(), greedy_decode(model, x, eps, "reference")
    with model.evaluating():
        assert torch.equal(graphed.graphed_decode(model, x, eps), expected)
    assert torch.equal(x, before)


@pytest.mark.skipif(not decode.has_triton() or torch.cuda.is_available(), reason="no Triton, or it compiles")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("output", [0, 2, 4, -1], ids=["weight", "mean", "scale", "coefficient"])
def test_interpreted_kernels_refuse_outputs_that_are_not_finite(make_model, make_levels, bad, output):
    from art_pixeldefend.models.pixelcnnpp.decoders import graphed

    model, x = make_model((2, 1, 2), mixtures=1), torch.from_numpy(make_levels(1, (2, 1, 2)))
    with torch.no_grad():
        model.network.head.bias[output] = bad
    with model.evaluating(), pytest.raises(ValueError, match="pixel_cnn must give finite outputs"):
        graphed.graphed_decode(model, x, 16)


@gpu
@pytest.mark.parametrize("count", [1, 7, 70, 300])
@pytest.mark.parametrize("shape", [(1, 17, 9), (3, 9, 12)])
def test_a_gpu_gives_the_images_of_a_cpu_call_after_call(make_model, make_levels, shape, count):
    model = make_model(shape)
    x = torch.from_numpy(make_levels(count, shape))
    expected = greedy_decode(model, x, 40, "compiled")
    model.cuda()
    assert choose_engine(model, "auto") == "graphed"
    x = x.cuda()  # where the engine could write into it
    for _ in range(2):
        found = greedy_decode(model, x, 40, batch_size=count)
        assert certify(model, x, found, 40).exact.all()
        assert (found.cpu() != expected).flatten(1).any(dim=1).sum() <= count // 50


@gpu
def test_changed_weights_are_seen(make_model, make_levels):
    model = make_model((1, 9, 9)).cuda()
    x = torch.from_numpy(make_levels(5, model.image_shape))
    before = greedy_decode(model, x, 40)
    with torch.no_grad():
        model.network.head.bias.add_(0.3)
    after = greedy_decode(model, x, 40)
    assert not torch.equal(before, after)
    assert certify(model, x, after, 40).exact.all()


@pytest.mark.skipif(not decode.has_triton(), reason="no Triton")
def test_calls_from_several_threads_keep_no_more_decoders_than_they_should(make_model, monkeypatch):
    from art_pixeldefend.models.pixelcnnpp.decoders import graphed

    class Decoder:
        def __init__(self, model, count, eps):
            time.sleep(1e-4)
            self.count = count

        def fits(self, model, count, eps):
            return self.count == count

    monkeypatch.setattr(graphed, "CapturedDecoder", Decoder)
    model = make_model((1, 4, 4))
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(graphed._decoder, model, i % 5, 16) for i in range(400)]
    assert all(call.result().count == i % 5 for i, call in enumerate(calls))
    assert len(graphed._decoders[model]) == graphed.KEPT
