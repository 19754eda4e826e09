import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from art_pixeldefend.batches import map_batches


@given(count=st.integers(0, 20), batch_size=st.integers(1, 25), room=st.integers(1, 25))
def test_result_is_that_of_one_piece_whatever_fits_into_memory(count, batch_size, room):
    sizes = []

    def function(x):
        if len(x) > room:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(x))
        return x * 2

    x = torch.arange(count)
    assert torch.equal(map_batches(function, x, batch_size), x * 2)
    assert max(sizes) <= min(batch_size, room) and sum(sizes) == count


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_one_image_that_does_not_fit_is_an_error(error):
    def function(x):
        raise error

    with pytest.raises(type(error)):
        map_batches(function, torch.arange(5), 4)


def test_other_errors_are_not_retried():
    calls = []

    def function(x):
        calls.append(len(x))
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        map_batches(function, torch.arange(5), 4)
    assert calls == [4]
