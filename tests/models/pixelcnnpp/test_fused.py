import pytest
import torch
import torch.nn.functional as F

from art_pixeldefend.models.pixelcnnpp.layers import WeightNormConv2d
from art_pixeldefend.models.pixelcnnpp.passes import fused

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 0.01)]  # and how far from torch's formula, of the largest number
PADDINGS = [(0, 0, 0, 0), (1, 1, 1, 0), (1, 0, 1, 0)]


@pytest.fixture(autouse=True, params=["numba_loops", "triton_kernels"])
def passes(request, monkeypatch):
    """Those of a CPU, and those of a GPU under Triton's interpreter."""
    if request.param == "triton_kernels" and torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU, and the tensors here are on the CPU")
    passes = pytest.importorskip(f"art_pixeldefend.models.pixelcnnpp.passes.{request.param}")
    monkeypatch.setattr(fused, "_passes", lambda device: passes)


def activations(filters, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(3, filters, 5, 6, generator=generator)
    return x.to(dtype).to(memory_format=torch.channels_last).requires_grad_()


def assert_same(function, formula, inputs, tolerance):
    """Values and gradients."""
    found, expected = function(*inputs), formula(*inputs)
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    pairs = [(found, expected)]
    pairs += zip(*(torch.autograd.grad(y, inputs, gradient) for y in (found, expected)), strict=True)
    for one, other in pairs:
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one.float() - other.float()).abs().max() <= tolerance * other.float().abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("filters", [1, 7, 24])
@pytest.mark.parametrize("padding", PADDINGS)
def test_concat_elu_and_its_gradient_are_those_of_the_formula(filters, padding, dtype, tolerance):
    def formula(x):
        return F.pad(F.elu(torch.cat([x, -x], dim=1)), padding)

    x = activations(filters, dtype)
    assert_same(lambda x: fused.concat_elu(x, 0.0, padding), formula, [x], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_what_dropout_drops_has_neither_value_nor_gradient_and_the_rest_is_scaled(dtype, tolerance):
    padding = (1, 1, 1, 0)
    x = activations(8, dtype)
    torch.manual_seed(0)
    kept = (fused.concat_elu(x, 0.25, padding) != 0).to(dtype) / 0.75

    def function(x):
        torch.manual_seed(0)
        return fused.concat_elu(x, 0.25, padding)

    def formula(x):
        return F.pad(F.elu(torch.cat([x, -x], dim=1)), padding) * kept

    assert_same(function, formula, [x], tolerance)


def test_dropout_is_as_frequent_as_asked_and_independent_between_places_and_calls():
    x = torch.ones(4, 16, 50, 50).to(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(0)
    one, other = ((fused.concat_elu(x, 0.3) == 0).float() for _ in range(2))
    error = (0.3 * 0.7 / one.numel()) ** 0.5
    assert abs(one.mean() - 0.3) < 4 * error
    per_filter = one.mean((0, 2, 3))
    assert (per_filter - 0.3).abs().max() < 5 * error * 32**0.5
    shifted = [one.roll(1, axis) for axis in range(4)] + [one.roll(16, 1), other]
    for another in shifted:
        assert abs(((one - 0.3) * (another - 0.3)).mean()) < 4 * 0.21 / one.numel() ** 0.5


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gate_and_its_gradients_are_those_of_the_formula(dtype, tolerance):
    def formula(x, ab):
        a, b = ab.chunk(2, dim=1)
        return x + a * torch.sigmoid(b)

    inputs = [activations(24, dtype), activations(48, dtype, seed=2)]
    assert_same(fused.gate, formula, inputs, tolerance)


def test_weight_norm_and_its_gradients_are_those_of_the_layer():
    layer = WeightNormConv2d(6, 5, (2, 3)).to(memory_format=torch.channels_last)
    weights = [layer.direction, layer.gain]
    assert_same(fused.weight_norm, lambda direction, gain: layer.weight(), weights, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        weight = fused.weight_norm(*weights)
    assert weight.dtype == torch.bfloat16
    assert torch.allclose(weight.float(), layer.weight(), rtol=0.008)  # the interpreter cuts digits off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(dtype):
    for bad in (torch.nan, torch.inf):
        x = torch.full((1, 8, 2, 2), bad, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        assert not fused.concat_elu(x)[:, :8].isfinite().any()
        assert not fused.gate(x, torch.cat([x, x], 1)).isfinite().any()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FFF8000])
def test_nan_of_any_bits_stays_nan_in_bfloat16(bits):
    """Weights are read as float32 and written as bfloat16: adding to the bits to round must not carry into the sign."""
    direction = torch.full((1, 8, 1, 1), bits, dtype=torch.int32).view(torch.float32)
    direction = direction.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        weight = fused.weight_norm(direction, torch.ones(1))
    assert weight.dtype == torch.bfloat16 and weight.isnan().all()


def test_they_are_for_training_in_the_layout_and_the_dtypes_they_know():
    x = activations(4, torch.float32)
    assert fused.applies(x, x)
    assert not fused.applies(x, x.bfloat16())
    assert not fused.applies(x.double())
    assert not fused.applies(x.contiguous())
    with torch.no_grad():
        assert not fused.applies(x)


def test_a_training_step_is_that_of_torch(make_model, make_levels, monkeypatch):
    model = make_model((3, 5, 7), dropout=0.0).train()
    x = torch.from_numpy(make_levels(2, (3, 5, 7)))
    gradients = []
    for layout, known in ((torch.channels_last, True), (torch.channels_last, False), (torch.contiguous_format, True)):
        with monkeypatch.context() as patch:
            if not known:
                patch.setattr(fused, "_passes", lambda device: None)  # as without Numba
            model.to(memory_format=layout).zero_grad()
            model.sub_pixel_log_probs(x.contiguous(memory_format=layout)).mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, rtol=1e-3, atol=1e-5 * other.abs().max().item())
