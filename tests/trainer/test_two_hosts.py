"""The reference trainer on two hosts: two network namespaces, each with an address of its own and a link between them.

  Compared: the log of two hosts with that of one process with twice the micro-batches (equal but for rounding); a run whose
  link was cut in the middle of a step, and which was started again, with the run that was not cut, to the bit; selection with
  scope="global", and vocabulary parts, over the hosts with one process that has all.
  Run, as root: make test ARGS=tests/trainer/test_two_hosts.py      (a minute on two idle cores)

The hosts share this machine's files, as hosts with a shared output_dir do.
Not here: two processes of one host (test_processes.py), four ranks (tests/support/ranks.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.trainer.runs import trainer

ADDRESSES, PORT, TIMEOUT = ("10.77.0.1", "10.77.0.2"), "29517", 15
STEPS, CUT_AT = 3, 2  # the link is cut in this step, counted from 0

SCRIPT = f"""
import os, subprocess, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from opd_ops import selective_opd_loss
from opd_ops.trainer.loop import OPDTrainer
from tests.support.cases import logit_pair
from tests.trainer.runs import trainer

folder, cuts, link = Path(sys.argv[1]), sys.argv[2] == "cut", os.environ["LINK"]

def make(name, **options):
    return trainer(folder / name, steps={STEPS}, resume=True, save_every=1, process_timeout={TIMEOUT}, **options)

def compare_with_all():
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    student, teacher = (x.view(2, 9, 97) for x in logit_pair(18, 97, noise=1.5))
    mine, part = slice(rank, rank + 1), slice(*((0, 60) if rank == 0 else (60, 97)))
    whole = selective_opd_loss(student, teacher, fraction=0.3)
    out = selective_opd_loss(student[mine], teacher[mine], fraction=0.3, scope="global", selection_group=group)
    assert torch.equal(out.selected, whole.selected[mine])
    assert out.selected.sum() not in (0, whole.selected.sum())
    out = selective_opd_loss(student[..., part], teacher[..., part], fraction=0.3, process_group=group)
    assert torch.equal(out.selected, whole.selected)
    torch.testing.assert_close(out.loss, whole.loss, rtol=1e-6, atol=0)
    print("equal over the hosts")

if cuts:
    Accelerator.end_training = lambda _: None  # it would close the process group, which the second run needs
    run = make("whole")
    compare_with_all()
    run.train()
    plain_loss = OPDTrainer._loss
    def loss(self, batch, n_items, step, number):
        if step == {CUT_AT} and number >= 2 and self.accelerator.process_index == 1:
            print("cut", flush=True)
            subprocess.run(["ip", "link", "set", link, "down"], check=True)
        return plain_loss(self, batch, n_items, step, number)
    OPDTrainer._loss = loss
make("cut").train()
"""


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@pytest.fixture
def hosts():
    """The names of two namespaces, each with one end of a link, of the same name."""
    if os.name != "posix" or shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("two hosts need root and iproute2, for network namespaces")
    names = [f"opd-{os.getpid()}-{i}" for i in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two hosts need network namespaces, which this machine does not allow: {error.stderr.strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def launch(hosts, folder, what):
    """The launchers of both hosts."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_FAMILY": "AF_INET"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    running = []
    for rank, host in enumerate(hosts):
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        command += ["--num_processes=2", "--num_machines=2", f"--machine_rank={rank}", f"--main_process_ip={ADDRESSES[0]}"]
        command += [
            f"--main_process_port={PORT}",
            "--mixed_precision=no",
            "--dynamo_backend=no",
            str(script),
            str(folder),
            what,
        ]
        env = os.environ | environment | {"GLOO_SOCKET_IFNAME": host, "LINK": host}
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return running


def ended(running):
    """Exit codes and output of both hosts."""
    said = [process.communicate(timeout=300)[0] for process in running]
    return [process.returncode for process in running], said


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.full
def test_two_hosts_are_one_with_twice_the_micro_batches_also_after_a_cut(hosts, tmp_path):
    running = launch(hosts, tmp_path, "cut")
    trainer(tmp_path / "one", steps=STEPS, gradient_accumulation_steps=4).train()
    codes, said = ended(running)
    assert all("equal over the hosts" in text for text in said), said
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "whole"), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=2e-5), (name, one["step"])

    assert "cut" in said[1]
    assert all(codes), said
    assert "LostProcessError: rank 0 of 2: rank 1 did not answer for" in said[0], said[0]
    assert "LostProcessError: rank 1 of 2: rank 0 does not answer" in said[1], said[1]
    assert [row["step"] for row in log(tmp_path / "cut") if "loss" in row] == list(range(1, CUT_AT + 1))

    ip("-n", hosts[1], "link", "set", hosts[1], "up")
    codes, said = ended(launch(hosts, tmp_path, "again"))
    assert codes == [0, 0], said
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]
