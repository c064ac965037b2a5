"""The names of lost processes: ranks that stand still, that ended, and a store that has gone, without processes of their own.

  Run: make test ARGS=tests/trainer/test_lost_processes.py

Not here: hosts that are cut off (test_two_hosts.py).
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from opd_ops.trainer import lost_processes
from opd_ops.trainer.lost_processes import ENDED, KEY, LostProcessError, LostProcesses
from tests.trainer.runs import trainer

TIMED_OUT = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete"


@pytest.fixture
def store(monkeypatch):
    for name, seconds in (("BEAT", 0.02), ("WATCHED", 0.4), ("REACHED", 0.5)):
        monkeypatch.setattr(lost_processes, name, seconds)
    opened = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=1), wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(opened.port))
    before = set(threading.enumerate())
    yield opened
    for thread in set(threading.enumerate()) - before:  # one that is in the store's code would abort the interpreter at its end
        thread.join(10)
        assert not thread.is_alive()


def process(rank, size=3):
    return LostProcesses(SimpleNamespace(process_index=rank, num_processes=size))


def error_of(rank, said=TIMED_OUT):
    with pytest.raises(LostProcessError) as error, process(rank):
        raise RuntimeError(said)
    return str(error.value)


def test_a_rank_that_stands_still_is_named_and_one_that_counts_is_not(store):
    with process(1):
        text = error_of(0)
    assert text.startswith("rank 0 of 3: rank 2 did not answer for 0.4 s, so its host was cut off or its process was killed")
    assert "Timed out waiting 15000ms" in text
    assert text.endswith("Start all processes again, with resume")


def test_ranks_that_ended_are_named_where_none_is_lost(store):
    with process(1), pytest.raises(MemoryError), process(2):
        raise MemoryError  # an error of its own, which stays what it is
    with process(1):
        assert "rank 0 of 3: rank 2 ended; the output of that process has its error" in error_of(0)
        with process(2):
            assert "all processes answer, but a collective failed; was one slower than process_timeout?" in error_of(0)


def test_a_run_counts_at_once_where_the_store_holds_the_end_of_another(store, monkeypatch):
    with process(2):
        pass
    assert store.get(KEY.format(2)) == ENDED
    monkeypatch.setattr(lost_processes, "BEAT", 60.0)
    with process(2):
        for _ in range(500):
            if store.get(KEY.format(2)) != ENDED:
                break
            time.sleep(0.01)
        assert store.get(KEY.format(2)) == b"1"


def test_a_store_that_has_gone_names_the_first_rank(store, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "9")
    assert "rank 1 of 3: rank 0 does not answer, nor does the store of its host at 127.0.0.1:9" in error_of(1)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("gloo")])
def test_other_errors_stay_as_they_are(error, store):
    with pytest.raises(type(error), match=str(error)), process(0):
        raise error


def test_one_process_needs_no_store():
    with pytest.raises(RuntimeError, match="gloo"), process(0, size=1):
        raise RuntimeError("gloo")


@pytest.mark.parametrize("seconds", [600.0, 1800.0, 90.0])
def test_process_timeout_is_the_timeout_of_gloo(seconds, tmp_path, monkeypatch):
    """Also where it is the default of a backend (600 of NCCL), which accelerate leaves out. The group has one process."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    trainer(tmp_path, steps=1, process_timeout=seconds)
    group = dist.group.WORLD._get_backend(torch.device("cpu"))
    dist.destroy_process_group()
    assert (group.name(), group.options._timeout.total_seconds()) == ("gloo", seconds)
