"""Process that measures a plan, read from standard input, and prints a line of JSON for each result.

    python -m parts.worker

Each number of threads needs its own process, since most thread pools are created once, one thread per available core.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

import torch

from parts import memory
from parts.cells import cells, updates
from parts.peers import find
from parts.plan import Plan


def results(plan: Plan) -> Iterator[tuple[str, Any]]:
    """Kind and content of each result of a plan, from a process with as many cores as threads."""
    environment = os.environ | {name: str(plan.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with _cores(plan.threads):
        process = subprocess.Popen(
            [sys.executable, "-m", "parts.worker"],
            cwd=Path(__file__).resolve().parents[1],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    to, out = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
    try:
        with to:
            json.dump(asdict(plan), to)
        for line in out:
            kind, content = json.loads(line)
            yield kind, content
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
    if process.returncode:
        raise RuntimeError(f"The process for {plan.threads} threads ended with code {process.returncode}.")


@contextlib.contextmanager
def _cores(count: int) -> Iterator[None]:
    """Limit child processes to `count` cores, so that no library runs more threads than requested."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def free_memory() -> float:
    """Bytes of available memory."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return 8.0 * 2**30


def work(plan: Plan, tell: Any) -> None:
    """Measure the plan, passing the kind and content of each result to `tell`."""
    torch.set_num_threads(plan.threads)
    peers, missing = find(list(plan.peers))
    for line in missing.values():
        tell("missing", line)
    for cell in cells(plan, peers, free_memory()):
        tell("cell", cell)
    if plan.update:
        for update in updates(plan):
            tell("update", update)
    if plan.memory is not None:
        torch_peers = [name for name in ("pyro", "zuko") if name in peers]
        tell("memory", {"sizes": plan.memory, "bytes": memory.measured(torch_peers, *plan.memory)})


def main() -> None:
    """Read the plan and print its results; everything else that is printed goes to standard error."""
    values = json.load(sys.stdin)
    plan = Plan(**{name: _frozen(value) for name, value in values.items()})
    out = sys.stdout

    def tell(kind: str, content: Any) -> None:
        print(json.dumps([kind, content]), file=out, flush=True)

    with contextlib.redirect_stdout(sys.stderr):
        work(plan, tell)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
