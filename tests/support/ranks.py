"""Four processes over gloo, kept for a session: `ranks.run(function, *arguments)` calls the function on each of them.

  function(*arguments)       in every process, where torch.distributed is set up; must be importable by its name
  `pair(i)`                  the group of ranks 2i and 2i + 1, so that two ranks need no processes of their own

A rank that waits for another too long fails with its own traceback, instead of hanging the suite.
Not here: what is run (inputs/test_vocabulary.py, selection/test_budget_over_ranks.py), launchers (trainer/test_processes.py).
"""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

SIZE = 4
TIMEOUT = 60  # seconds that a collective waits for the other ranks

_pairs = []


class Processes:
    """The processes; `run` gives what each rank returned, in their order."""

    def __init__(self):
        self._start()

    def _start(self):
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")  # imports once, not in each process
        context.set_forkserver_preload(["tests.support.preloaded"])
        store = str(Path(self.folder.name) / "store")
        self.pipes, self.processes = [], []
        for rank in range(SIZE):
            here, there = context.Pipe()
            self.pipes.append(here)
            self.processes.append(context.Process(target=_work, args=(rank, store, there), daemon=True))
            self.processes[-1].start()

    def run(self, function, *arguments):
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        got = [self._answer(pipe) for pipe in self.pipes]
        failed = [f"rank {rank}:\n{text}" for rank, (is_good, text) in enumerate(got) if not is_good]
        if failed:  # some may have sent what others never took
            self.close()
            self._start()
            raise AssertionError("\n".join(failed))
        return [value for _, value in got]

    def _answer(self, pipe):
        """Of a process that may have died, or wait for something else than the others."""
        try:
            if pipe.poll(2 * TIMEOUT):
                return pickle.loads(pipe.recv_bytes())
        except EOFError:
            return False, "the process ended"
        return False, f"no answer in {2 * TIMEOUT} seconds"

    def close(self):
        for process in self.processes:
            process.terminate()
            process.join()
        self.folder.cleanup()


def pair(i):
    """In a process: ranks 2i and 2i + 1."""
    return _pairs[i]


def own_pair():
    """In a process: the two ranks it is one of."""
    import torch.distributed as dist

    return _pairs[dist.get_rank() // 2]


def _work(rank, store, pipe):
    os.environ["OMP_NUM_THREADS"] = "1"
    from tests.support import kernels

    kernels.use()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    patience = timedelta(seconds=TIMEOUT)  # a new group does not inherit it
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=patience)
    _pairs.extend(dist.new_group([2 * i, 2 * i + 1], timeout=patience) for i in range(SIZE // 2))
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
