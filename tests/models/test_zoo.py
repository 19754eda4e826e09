import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from art_pixeldefend import PixelCNNpp
from art_pixeldefend.models import checkpoint, zoo
from art_pixeldefend.models.base import ImageModel
from art_pixeldefend.models.generator import Generator


class Other(ImageModel):
    """A model of another kind, with an argument and a buffer of its own."""

    kind = "other"

    def __init__(self, image_shape, width=2):
        super().__init__()
        self.image_shape, self.width = tuple(image_shape), width
        self.weight = torch.nn.Parameter(torch.randn(width))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


@pytest.fixture
def other_kind(monkeypatch):
    monkeypatch.setitem(zoo.KINDS, "other", (__name__, "Other"))


@pytest.fixture
def other_file(other_kind, tmp_path):
    path = tmp_path / "other.safetensors"
    Other((1, 2, 3), width=5).save(path)
    return path


def test_a_new_kind_of_model_is_one_class_and_one_entry(other_file):
    loaded = zoo.load(other_file, "cpu")
    assert type(loaded) is Other and loaded.configuration == {"image_shape": (1, 2, 3), "width": 5}
    assert checkpoint.read_header(other_file)["format"] == checkpoint.FORMAT


def test_a_model_of_another_kind_is_refused_by_the_argument_s_name(other_file):
    with pytest.raises(ValueError, match=r"pixel_cnn must be a PixelCNNpp.*Other"):
        zoo.as_model(str(other_file), PixelCNNpp, name="pixel_cnn")
    with pytest.raises(ValueError, match=r"pixel_cnn must be a PixelCNNpp.*got Other"):
        zoo.as_model(Other((1, 2, 3)), PixelCNNpp, name="pixel_cnn")
    with pytest.raises(ValueError, match="not 'pixelcnnpp'"):
        PixelCNNpp.load(other_file)


def test_the_error_about_a_model_lists_the_bundled_models_of_its_kind_once(other_kind, tmp_path):
    density = ", ".join(zoo.names("pixelcnnpp"))
    with pytest.raises(FileNotFoundError) as error:
        zoo.as_model("imagenet", PixelCNNpp, name="pixel_cnn")
    expected = f"pixel_cnn must be a PixelCNNpp, the path of one, or one of {density}; there is no file 'imagenet'"
    assert str(error.value) == expected
    with pytest.raises(ValueError, match=rf"one of {', '.join(zoo.names('vae'))}, got int$"):
        zoo.as_model(3, Generator)
    with pytest.raises(ValueError, match=r"^model must be a Other or the path of one, got int$"):
        zoo.as_model(3, Other)


def test_a_model_that_is_passed_is_returned_as_it_is(make_model):
    model = make_model((1, 4, 4))
    assert zoo.as_model(model, PixelCNNpp) is model


def test_names_are_listed_by_kind():
    assert "digits" in zoo.names("pixelcnnpp") and zoo.names("none") == []
    assert "digits-score" in zoo.names("score")
    assert zoo.names() == sorted(name for kind in zoo.KINDS for name in zoo.names(kind))
    with pytest.raises(ValueError, match="digits"):
        zoo.path("imagenet")


def test_a_file_of_the_format_before_kinds_is_a_pixelcnnpp(make_model, make_levels, tmp_path):
    model, x = make_model((1, 6, 6)), make_levels(3, (1, 6, 6))
    header = {"configuration": model.configuration, "provenance": {"dataset": "smooth"}}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "old.safetensors", metadata={"art_pixeldefend": json.dumps(header)})
    loaded = zoo.load(tmp_path / "old.safetensors", "cpu")
    assert torch.equal(loaded.log_prob(x), model.log_prob(x)) and loaded.provenance == {"dataset": "smooth"}
    assert loaded.fingerprint() == model.fingerprint()


def test_a_file_of_a_newer_format_is_refused(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    make_model((1, 4, 4)).save(tmp_path / "new.safetensors")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="newer version"):
        zoo.load(tmp_path / "new.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_loaded_nor_saved(value, make_model, tmp_path, monkeypatch):
    model = make_model((1, 4, 4))
    with torch.no_grad():
        model.network.head.gain[0] = value
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"network\.head\.gain"):
        model.save(path)
    assert not path.exists()
    monkeypatch.setattr("art_pixeldefend.models.base._check_finite", lambda tensors: None)
    model.save(path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"model\.safetensors.*network\.head\.gain"):
        zoo.load(path)


def test_loading_leaves_torch_s_random_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    zoo.load("digits", "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_loaded_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        model = zoo.load("digits", "cpu")
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    model.loss(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).backward()


def test_a_device_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="device must"):
        zoo.load("digits", "nonsense")


def test_a_loaded_model_is_float32_whatever_the_default_dtype_is():
    torch.set_default_dtype(torch.float64)
    try:
        assert {p.dtype for p in PixelCNNpp.from_pretrained("digits").parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("name", "count"), [("digits", 400), ("fashion-mnist", 100), ("fashion-mnist-40x5", 16)])
def test_weights_stored_in_half_precision_keep_three_digits_of_bits_per_dim(name, count, request, tmp_path):
    """All test images of digits; a few of the others, whose differences are smaller than their deviation."""
    model = PixelCNNpp.from_pretrained(name)
    x = request.getfixturevalue(model.provenance["dataset"].replace("-", "_")).x_test[:count]
    model.save(tmp_path / "half.safetensors", dtype=torch.float16)
    half = zoo.load(tmp_path / "half.safetensors", "cpu")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * zoo.path(name).stat().st_size
    assert half.dtype == torch.float32
    assert abs(half.bits_per_dim(x).mean() - model.bits_per_dim(x).mean()) < 0.0005


def what_it_is(path):
    with pytest.raises(ValueError, match=r"^--model must be a PixelCNNpp") as error:
        zoo.as_model(path, PixelCNNpp, name="--model")
    return str(error.value).partition(f"{str(path)!r} is ")[2]


def test_a_file_or_folder_that_is_not_a_model_is_refused_by_what_it_is(make_levels, tmp_path):
    """A run's folder and checkpoint, finished or not, a pickle, images, a classifier."""
    from art_pixeldefend.models.training import Settings, train

    run = tmp_path / "run"
    model = PixelCNNpp((1, 4, 4), filters=2, resnets=1, mixtures=1)
    train(model, PixelCNNpp.loss, make_levels(4, (1, 4, 4)), Settings(steps=1), run, verbose=False)
    there = f"its model is {str(run / 'model.safetensors')!r}"
    assert what_it_is(run) == f"the folder of a training run; {there}"
    checkpoint_is = what_it_is(run / "checkpoint.safetensors")
    assert checkpoint_is == f"the checkpoint of a training run, which train --resume continues; {there}"
    (run / "model.safetensors").unlink()
    assert what_it_is(run) == "the folder of a training run; it has not finished"
    assert what_it_is(run / "checkpoint.safetensors").endswith("it has not finished")
    assert what_it_is(tmp_path) == "a folder"
    for name in ("weights.pth", "weights"):
        torch.save({"weights": torch.zeros(3)}, tmp_path / name)
        assert what_it_is(tmp_path / name).startswith("a PyTorch or pickle file")
    checkpoint.write(tmp_path / "c.safetensors", {"a": torch.zeros(1)}, {"network": "vgg", "configuration": {}})
    assert what_it_is(tmp_path / "c.safetensors") == "of kind 'classifier', not a model of images"


def test_a_checkpoint_of_version_0_1_is_refused_by_what_it_is(tmp_path):
    header = {"art_pixeldefend": json.dumps({"step": 3, "settings": {"filters": 4}, "start": None})}
    save_file({"parameter.0": torch.zeros(1)}, tmp_path / "c.safetensors", metadata=header)
    assert what_it_is(tmp_path / "c.safetensors").startswith("the checkpoint of a training run")


def test_a_file_is_written_without_a_copy_of_it_in_memory(tmp_path):
    """The peak of resident memory grows by less than the file."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        pytest.skip("the peak of memory can be reset on Linux only")

    def resident(field):
        return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) * 1024

    tensors, size = {f"{i}": torch.ones(8_000_000) for i in range(4)}, 128_000_000
    clear.write_text("5")
    before = resident("VmRSS")
    checkpoint.write(tmp_path / "large.safetensors", tensors, {})
    assert resident("VmHWM") - before < size / 2
    assert (tmp_path / "large.safetensors").stat().st_size > size


def test_files_are_as_readable_as_others(make_model, tmp_path):
    make_model((1, 4, 4)).save(tmp_path / "model.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
