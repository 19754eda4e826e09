import contextlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from art_pixeldefend.models.pixelcnnpp.decoders.threads import share_out

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before[0])
    sys.setswitchinterval(before[1])


def threads_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_every_image_is_in_one_part_and_in_order(count):
    assert share_out(torch.arange, count, CPU).tolist() == list(range(count))


def test_each_thread_has_its_operations_to_itself():
    barrier = threading.Barrier(3, timeout=10)

    def work(first, end):
        barrier.wait()  # all three run at the same time
        return torch.tensor([torch.get_num_threads()])

    assert share_out(work, 7, CPU).tolist() == [1, 1, 1]


def test_what_is_set_for_the_process_is_set_back_after_a_failure_too():
    sys.setswitchinterval(1e-4)  # not a whole number of microseconds in binary: setting it to what it is changes it
    interval = sys.getswitchinterval()

    def fail(first, end):
        raise MemoryError

    for work in (torch.arange, fail):
        with contextlib.suppress(MemoryError):
            share_out(work, 7, CPU)
        assert torch.get_num_threads() == threads_of_a_new_thread() == 3
        assert sys.getswitchinterval() == interval


def test_calls_from_several_threads_do_not_mix():
    interval = sys.getswitchinterval()

    def work(first, end):
        time.sleep(0.01)
        assert torch.get_num_threads() == 1
        return torch.arange(first, end)

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(share_out, work, 50, CPU) for _ in range(8)]
    assert all(call.result().tolist() == list(range(50)) for call in calls)
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3
    assert sys.getswitchinterval() == interval


def test_one_image_and_another_device_keep_torchs_threads():
    def work(first, end):
        return torch.full((end - first,), torch.get_num_threads())

    assert share_out(work, 1, CPU).tolist() == [3]
    assert share_out(work, 2, torch.device("meta")).tolist() == [3, 3]
