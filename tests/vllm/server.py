"""A real vLLM server on this machine's CPUs, as a process of its own that tests start, kill and start again.

  The program is that of another virtual environment, named by the environment variable OPD_VLLM (`make test-vllm` sets it).
  Seconds of CPU are read from /proc, of the two processes that a server has: the one that speaks HTTP, and the engine.

Not here: the stand-in for it that all other tests use (tests/support/servers.py), what is asked of it (test_vllm.py).
"""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

PROGRAM = "OPD_VLLM"
STARTS_WITHIN = 420.0  # seconds; half a minute on an idle machine
FLAGS = [
    *("--dtype", "float32"),
    *("--max-model-len", "1024"),
    *("--max-logprobs", "64"),
    "--enforce-eager",
    "--enable-scale-out",  # the route for scores of given ids
    "--enable-lora",
    *("--max-lora-rank", "16"),
    # Without these modules, prompt log-probabilities with --enable-lora end the engine; so does seeded sampling while the
    # prefill of a prompt is split, which fewer batched tokens would do.
    *("--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("--max-num-batched-tokens", "8192"),
]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # One thread, on whichever core is free.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class VLLMServer:
    """`vllm serve` of a model's folder, on a free port that a restart keeps.

    Args:
        folder: The model, as transformers saves it.
        log: File for what the server prints.
        environment: More variables for it.
    """

    def __init__(self, folder: Path, log: Path, **environment: str) -> None:
        self.folder, self.log, self.environment = folder, log, ENVIRONMENT | environment
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start the server. Returns the seconds until it answered; an error has the end of what it printed."""
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        command = [os.environ[PROGRAM], "serve", str(self.folder), "--served-model-name", "smollm2", *address, *FLAGS]
        began = time.monotonic()
        with self.log.open("ab") as out:
            # A group of its own: a killed server must not leave its engine.
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=os.environ | self.environment, start_new_session=True
            )
        while time.monotonic() - began < STARTS_WITHIN:
            if self.process.poll() is not None:
                break
            if self.is_up():
                return time.monotonic() - began
            time.sleep(0.5)
        self.kill()
        raise RuntimeError(f"vLLM did not start; the end of {self.log}:\n{self.log.read_text(errors='replace')[-4000:]}")

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (OSError, urllib.error.URLError):
            return False

    def kill(self) -> None:
        """End the server and its engine at once, as a lost machine does."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def cpu_seconds(self) -> dict[str, float]:
        """CPU seconds so far: of the process that speaks HTTP, and of its engine."""
        assert self.process is not None
        group = self.process.pid
        seconds = {"http": 0.0, "engine": 0.0}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[2]) == group:
                seconds["http" if int(folder.name) == group else "engine"] += (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
        return seconds


CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
