"""A few processes that talk over gloo or NCCL and carry out, together, the functions that tests name."""

from __future__ import annotations

import contextlib
import importlib
import os
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import lighterage

LIMIT_S = 60
ROOT = Path(__file__).parents[2]


class Crew:
    """Processes that are kept from one call to the next, since starting them takes seconds."""

    def __init__(self, num_processes: int, backend: str = "gloo", limit_s: float = LIMIT_S) -> None:
        """`backend`: "gloo", or "nccl", where each process has its rank's CUDA device. `limit_s`: for each call."""
        self._num = num_processes
        self._backend = backend
        self._limit_s = limit_s
        self._processes: list[subprocess.Popen[str]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, work: Callable[[int, int], None]) -> None:
        """Call `work(rank, num_processes)`, a function of a test module, in every process.

        Raises:
            AssertionError: it failed in some process, or took too long; the tracebacks are the message.
        """
        if not self._processes:
            self._start()
        logs = self._logs()
        already = [log.stat().st_size for log in logs]
        for process in self._processes:
            assert process.stdin is not None
            print(work.__module__, work.__name__, file=process.stdin, flush=True)
        said = self._answers()
        if said != ["ok"] * self._num:
            self.stop(kill=True)
            texts = [log.read_text()[size:] for log, size in zip(logs, already, strict=True)]
            self._forget()
            told = [f"--- rank {rank}: {said[rank] or 'no answer'}\n{text}" for rank, text in enumerate(texts)]
            raise AssertionError("\n".join(told))

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
        # Multicast over NVLink is more than some machines let a process have.
        env |= {"NCCL_NVLS_ENABLE": "0", "NCCL_SOCKET_IFNAME": "lo", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        for rank, log in enumerate(self._logs()):
            command = [sys.executable, "-m", "tests.distributed.crew", self._backend, str(rank), str(self._num)]
            command += [self._folder.name, str(self._limit_s)]
            with log.open("w") as out:
                pipe = subprocess.PIPE
                self._processes.append(
                    subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=out, env=env, cwd=ROOT, text=True)
                )

    def _logs(self) -> list[Path]:
        assert self._folder is not None
        return [Path(self._folder.name) / f"rank{rank}.txt" for rank in range(self._num)]

    def _answers(self) -> list[str]:
        """What each process says: "ok", "failed", or nothing. After the first failure the others may wait for ever."""
        answers = [""] * self._num
        deadline = time.monotonic() + self._limit_s
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    selector.unregister(key.fileobj)
                    stdout = self._processes[key.data].stdout
                    assert stdout is not None
                    answers[key.data] = stdout.readline().strip()
                    if answers[key.data] != "ok":
                        deadline = min(deadline, time.monotonic() + 2)
        return answers

    def stop(self, kill: bool = False) -> None:
        """End the processes."""
        processes, self._processes = self._processes, []
        for process in processes:
            assert process.stdin is not None and process.stdout is not None
            if kill:
                process.kill()
            process.stdin.close()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        if not kill:
            self._forget()

    def _forget(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def place() -> torch.device:
    """Where the tensors of this process belong."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def settle(offloader: lighterage.Offloader) -> None:
    """NCCL lets go of what it has sent, which may hold a graph, a moment after that has arrived."""
    if dist.get_backend() == "nccl":
        torch.cuda.synchronize()
        deadline = time.monotonic() + 5
        while offloader.sections and time.monotonic() < deadline:
            time.sleep(0.01)


def begin(backend: str, rank: int, num_processes: int, limit_s: float, **where: object) -> None:
    """Make the process group. `where`: the store, or an address."""
    if backend == "nccl":
        torch.cuda.set_device(rank)
        where["device_id"] = torch.device("cuda", rank)
    limit = timedelta(seconds=limit_s)
    dist.init_process_group(backend, rank=rank, world_size=num_processes, timeout=limit, **where)  # type: ignore[arg-type]


def serve(backend: str, rank: int, num_processes: int, folder: str, limit_s: float) -> None:
    """What each process does: one named function after another, until there is no more."""
    begin(backend, rank, num_processes, limit_s, store=dist.FileStore(f"{folder}/store", num_processes))
    for line in sys.stdin:
        module, function = line.split()
        torch.manual_seed(0)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                getattr(importlib.import_module(module), function)(rank, num_processes)
            dist.barrier()
            print("ok", flush=True)
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            print("failed", flush=True)
    # gloo aborts where one process is gone while another still talks to it.
    dist.barrier()
    dist.destroy_process_group()
    # At once: gloo's threads do not outlive a tidy exit well.
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
