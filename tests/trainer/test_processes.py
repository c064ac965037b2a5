"""Two processes of the reference trainer over gloo against one with twice the micro-batches, number by number: whole models,
by `accelerate launch --num_processes 2`, and models that FSDP2 shards, the run of these cut in two and continued from a sharded
checkpoint, the newer one being damaged. A teacher's server that fails in one of the processes.

The file is also the server that forks processes with the environment of a launcher's: importing takes most of a run otherwise.

Command: make test ARGS=tests/trainer/test_processes.py
Not here: selection over several processes (selection/test_budget_over_ranks.py), shared vocabularies
(inputs/test_vocabulary.py).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from accelerate.state import DistributedType, PartialState

from tests.support.servers import StandIn, prompt_logprobs, scripted
from tests.trainer.runs import trainer

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}


# --- in each process -------------------------------------------------------------------------------------------------


def train(folder, steps, options="{}"):
    """`options`: more of them, in JSON."""
    if os.environ.get("ACCELERATE_USE_FSDP"):
        # accelerate decides by the kind of machine and has no FSDP for CPUs: here they pass for another kind, over gloo.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    run = trainer(
        Path(folder), steps=int(steps), gradient_accumulation_steps=2, resume=True, save_every=1, **json.loads(options)
    )
    print("kind", run.accelerator.distributed_type.value, type(next(run.unwrapped.parameters())).__name__)
    run.train()


def train_served(folder, steps, url):
    options = {"taught_by": None, "divergence": "tail_aware", "teacher_top_k": 4, "lora_rank": 2, "server_retry_seconds": 0}
    trainer(Path(folder), steps=int(steps), resume=True, teacher_url=url, **options).train()


FUNCTIONS = {"train": train, "train_served": train_served}


def _rank(number, environment, output, name, arguments):
    """Fork: a process that runs the function as a launcher's, what it says at the end of the file `output`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(environment | {"RANK": str(number), "LOCAL_RANK": str(number)})
        with open(output, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        FUNCTIONS[name](*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve():
    """For each line of the input: two processes of a job, then a line with whether both ended well."""
    for line in sys.stdin:
        ranks = [_rank(number, *json.loads(line)) for number in range(2)]
        statuses = [os.waitpid(pid, 0)[1] for pid in ranks]
        print(json.dumps(not any(statuses)), flush=True)


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forks():
    """A process that has imported all that a trainer needs, which takes most of the time of a job; it forks each job's."""
    here = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command, environment = [sys.executable, "-m", "tests.trainer.test_processes"], os.environ | CPU | {"PYTHONPATH": here}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        yield server
        server.stdin.close()


def _fork(server, folder, name, *arguments, fails=False, **environment):
    """What the two processes said; the store of a job is its own."""
    output = folder / "said"
    output.write_text("")
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    job = (environment | group, str(output), name, [str(folder / "two"), *map(str, arguments)])
    print(json.dumps(job), file=server.stdin, flush=True)
    good = json.loads(server.stdout.readline())
    said = output.read_text()
    assert good != fails, said
    return said


def _launch(folder, steps):
    """By accelerate's launcher."""
    path = folder / "script.py"
    path.write_text("import sys\nfrom tests.trainer.test_processes import train\ntrain(*sys.argv[1:])\n")
    # --multi_gpu is its word for several processes of one machine; without it it starts one on a machine without a GPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={_free_port()}", str(path)]
    here = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command += [str(folder / "two"), str(steps)]
    environment = os.environ | CPU | {"PYTHONPATH": here}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _free_port():
    with socket.socket() as got:
        got.bind(("127.0.0.1", 0))
        return got.getsockname()[1]


def _logs(folder):
    return [[json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "environment", "cuts"),
    [("MULTI_CPU Parameter", {}, [3]), ("FSDP DTensor", FSDP2, [2, 3])],
)
def test_two_processes_are_one_with_twice_the_micro_batches(forks, kind, environment, cuts, tmp_path):
    trainer(tmp_path / "one", steps=3, gradient_accumulation_steps=4).train()
    for steps in cuts:
        checkpoints = sorted((tmp_path / "two" / "checkpoints").glob("step-*"))
        for path in checkpoints[-1:]:  # damaged: both processes go back to the one before, saved in the middle of a step
            os.truncate(next(path.rglob("*.distcp")), 100)
        said = _fork(forks, tmp_path, "train", steps, **environment) if environment else _launch(tmp_path, steps)
        assert f"kind {kind}" in said
        assert said.count("is now damaged-") == bool(checkpoints)
    for one, two in zip(*_logs(tmp_path), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=2e-5), (name, one["step"])
    assert any(row.get("n_valid", 0) > 24 for row in _logs(tmp_path)[1])  # more than one process's share
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


@pytest.mark.full
def test_a_live_self_teacher_under_fsdp_reads_the_weights_of_all_processes(forks, tmp_path):
    live = {"taught_by": None, "teacher_weights": "live", "teacher_prompt": "w20 w21 {prompt}", "fraction": 1.0, "eval_size": 0}
    trainer(tmp_path / "one", steps=3, gradient_accumulation_steps=4, **live).train()
    said = _fork(forks, tmp_path, "train", 3, json.dumps(live), **FSDP2)
    assert "kind FSDP DTensor" in said
    one, two = ([row["loss"] for row in rows if "loss" in row] for rows in _logs(tmp_path))
    assert two == pytest.approx(one, rel=2e-5)
    assert len(one) == 3
    assert max(one) > 1.05 * min(one)  # the updates show in the losses


@pytest.mark.full
def test_a_server_that_fails_in_one_process_ends_both_with_a_checkpoint(forks, tmp_path):
    server, asked = StandIn(prompt_logprobs), []

    def answer(path, body):
        asked.append(body.get("prompt") if "prompt_logprobs" in body else None)
        n = len([prompt for prompt in asked if prompt])
        # Each process asks once in `check`, for 4 prompts in the evaluation and for 4 in a step: the failure is in step 2.
        return (503, {"error": {"message": "no room"}}) if n == 20 else server(path, body)

    with scripted(answer) as (url, _):
        said = _fork(forks, tmp_path, "train_served", 3, url, fails=True)
        assert said.count("answered 503: no room. Saved after step 1: pass resume to continue") == 1
        assert "failed in another process, whose output has its error. Saved after step 1" in said
        assert [path.name for path in (tmp_path / "two" / "checkpoints").iterdir()] == ["step-000001"]
        _fork(forks, tmp_path, "train_served", 3, url)
    rows = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


if __name__ == "__main__":
    _serve()
