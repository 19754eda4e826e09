"""Settings are the process's, and some cannot be taken back: each case has a process of its own."""

import subprocess
import sys

import pytest

CHECK = """
import torch
from art_pixeldefend import PixelCNNpp
from art_pixeldefend.precision import EXACT, OPERATIONS

def read(setting):
    try:
        return setting()
    except RuntimeError as error:  # torch's older interface, where the newer one was used
        return str(error)

def settings():
    old = (lambda: torch.backends.cudnn.allow_tf32, lambda: torch.backends.cuda.matmul.allow_tf32,
           torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.benchmark)
    return [operation.fp32_precision for operation in OPERATIONS], [read(setting) for setting in old]

SETTING
before = settings()
model = PixelCNNpp((1, 4, 4), filters=4, resnets=1, mixtures=2)
inside = []
model.network.register_forward_hook(lambda *_: inside.append(settings()))
model.bits_per_dim(torch.zeros(1, 1, 4, 4))
assert len(inside) == 1 and all(precision in EXACT for precision in inside[0][0])
assert settings() == before
try:
    with model.evaluating(), model.evaluating():
        raise KeyError
except KeyError:
    assert settings() == before
"""


@pytest.mark.parametrize(
    "setting",
    [
        "pass",
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cudnn.allow_tf32 = False",
        "torch.backends.cudnn.benchmark = True",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cudnn.fp32_precision = 'tf32'",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    ],
)
def test_float32_is_exact_inside_and_the_users_settings_are_back_after(setting):
    subprocess.run([sys.executable, "-c", CHECK.replace("SETTING", setting)], check=True)


def test_what_was_shared_between_operations_stays_shared():
    setting = "torch.backends.fp32_precision = 'tf32'"
    more = "torch.backends.fp32_precision = 'ieee'\nassert settings()[0] == ['ieee'] * 4, settings()"
    subprocess.run([sys.executable, "-c", CHECK.replace("SETTING", setting) + more], check=True)
