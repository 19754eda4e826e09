import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from art_pixeldefend.processes import ProcessGroup, process_group


def two_processes(folder, script, *arguments):
    """Runs a Python script in two processes of torchrun."""
    path = folder / "script.py"
    path.write_text(script)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path, *arguments],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


ENTER_OFTEN = """
import sys, time
from datetime import timedelta
import torch
from art_pixeldefend import processes
from art_pixeldefend.evaluation.grid import Grid, Row
from art_pixeldefend.evaluation.paper.grids import defences
from art_pixeldefend.evaluation.paper.reproduce import reproduce
processes.TIMEOUT = timedelta(seconds=3)
torch.set_num_threads(1)
for entry in range(12):
    group = processes.process_group()
    assert group.gather((entry, group.rank)) == [(entry, 0), (entry, 1)]
for entry in range(3):
    torch.distributed.destroy_process_group()  # by a careless caller
    group = processes.process_group()
    assert group.gather((entry, group.rank)) == [(entry, 0), (entry, 1)]
torch.distributed.destroy_process_group()
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=group.rank, world_size=2)
callers = processes.process_group()
assert callers is not group and callers.gather(callers.rank) == [0, 1]
processes._leave()  # as at exit: the caller's group is left alone
assert torch.distributed.is_initialized()
torch.distributed.destroy_process_group()
group = processes.process_group()
if group.rank == 1:
    time.sleep(6)  # longer than the time limit of an exchange
group.wait()
grid = Grid(
    "digits", (Row("vgg", "normal", "pixeldefend"),), eps=(40,), attacks=("fgsm",), defences=defences(56, 3),
    models={"pixel_cnn": "digits"}, recipe="digits", steps=2, sizes={"vgg": {"width": 2}}, images=2, validation=2,
    chunk=1,
)
for figures in (True, False):
    reproduce(grid, sys.argv[1], figures=figures, starts=1, verbose=False)
"""


def test_one_group_serves_twelve_entries_long_waits_and_a_grid_with_starts(tmp_path):
    done = two_processes(tmp_path, ENTER_OFTEN, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "table.md").is_file() and (tmp_path / "figures" / "figure5.json").is_file()


END_EARLY = """
from art_pixeldefend.processes import process_group
group = process_group()
group.wait()
if group.rank == 0:
    try:
        group.gather("alone")
    except RuntimeError as error:
        print("refused:", error)
"""


def test_a_process_that_has_ended_is_not_waited_for(tmp_path):
    done = two_processes(tmp_path, END_EARLY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refused: 1 of 2 processes ended while process 0 waits" in done.stdout


THREADS = """
from pathlib import Path
import torch
from art_pixeldefend import processes
def threads():
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
processes.process_group()
torch.distributed.all_reduce(torch.ones(1))
assert any("gloo" in name for name in threads()), threads()
processes._leave()
assert not any("gloo" in name for name in threads()), threads()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted under /proc")
def test_no_thread_of_the_group_is_left_when_the_interpreter_ends(tmp_path):
    """A thread that takes the interpreter's lock after that ends the process with SIGABRT."""
    done = two_processes(tmp_path, THREADS)
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_torchrun_a_process_is_alone():
    group = process_group()
    assert (group.rank, group.world_size, group.gather("x")) == (0, 1, ["x"])
    group.wait()
    assert not dist.is_initialized()


def test_a_group_that_the_caller_has_created_is_used_and_left_to_them(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert process_group().world_size == 1
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
    assert process_group().gather(3) == [3]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_task_is_done_by_one_process(world_size):
    shards = [ProcessGroup(rank, world_size).shard(range(7)) for rank in range(world_size)]
    assert sorted(task for shard in shards for task in shard) == list(range(7))
