"""Robustness of training: a file too large for memory, kills at random moments, several processes.

    python benchmarks/endurance.py                         # all three
    python benchmarks/endurance.py file --gigabytes 5
    python benchmarks/endurance.py kills --times 20
    python benchmarks/endurance.py processes

file: a flow is fitted for one epoch to a temporary file of the given size, and the peak resident memory of that process
is read from the operating system (Linux). kills: a fit is killed at random moments and resumed, and its final weights
are compared with those of an uninterrupted fit. processes: training rows per second of one process, and of two that
share each batch. Results go to results/endurance.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from directions import RESULTS, about, write
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 64
CHUNK_ROWS = 2**16

FIT_FILE = r"""
    import re, sys, time
    import numpy as np, torch
    from pyro_maf import MAF, fit

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = np.load(sys.argv[1], mmap_mode="r")
    model = MAF(data.shape[1], num_layers=2, hidden_dims=[64])
    started = time.monotonic()
    result = fit(model, data, batch_size=8192, max_epochs=1, progress="always")
    print(time.monotonic() - started, result.validation_log_likelihood)
    # Not getrusage, whose peak includes the parent's memory before exec.
    print(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""

FIT_KILLED = """
    import sys, torch
    from pyro_maf import MAF, fit

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = torch.randn(20_000, 6, generator=torch.Generator().manual_seed(1)).cumsum(1)
    model = MAF(6, num_layers=3, hidden_dims=[64], batch_norm=True)
    print("started", flush=True)
    fit(model, rows, batch_size=50, max_epochs=12, folder=sys.argv[1], resume=True, progress=False)
    print("ended", flush=True)
"""

FIT_SHARED = """
    import os, sys, time, torch
    from pyro_maf import MAF, fit
    from pyro_maf.training.objective import MaximumLikelihood

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dim, units, batch, steps = map(int, sys.argv[1:])
    rows = torch.randn(batch * steps, dim, generator=torch.Generator().manual_seed(1))
    moments = []
    step = MaximumLikelihood.step

    def timed(objective, batch):
        moments.append(time.perf_counter())
        return step(objective, batch)

    MaximumLikelihood.step = timed
    fit(MAF(dim, hidden_dims=[units] * 2), rows, validation=rows[:10], batch_size=batch, max_epochs=2, progress=False)
    if os.environ.get("RANK", "0") == "0":
        second = moments[len(moments) // 2 :]
        print(batch * (len(second) - 1) / (second[-1] - second[0]))
"""
NETWORKS = ((21, 512, 100), (63, 512, 100), (63, 512, 1000))


def main(arguments: list[str] | None = None) -> None:
    """Run the parts named and add them to the stored results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="file, kills, processes; default: all")
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the file; default: %(default)g")
    parser.add_argument("--times", type=int, default=20, help="number of kills; default: %(default)d")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each process; default: %(default)d")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where results go")
    options = parser.parse_args(arguments)
    stored = options.out / "endurance.json"
    results: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    measure = {
        "file": lambda: large_file(options.gigabytes),
        "kills": lambda: kills(options.times),
        "processes": lambda: shared(options.steps),
    }
    for part in options.parts or measure:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            results |= {part: measure[part](), "about": about()}
        print(json.dumps({part: results[part]}, indent=1))
        options.out.mkdir(parents=True, exist_ok=True)
        write(stored, json.dumps(results, indent=1))


def large_file(gigabytes: float) -> dict[str, float]:
    """Time and peak resident memory of fitting one epoch to a file of the given size."""
    path = Path("rows.npy")
    rows = int(gigabytes * 1e9 / (4 * COLUMNS))
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(COLUMNS, COLUMNS)) / COLUMNS**0.5 + np.eye(COLUMNS)
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, COLUMNS)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, CHUNK_ROWS):
            part = generator.standard_normal((min(CHUNK_ROWS, rows - start), COLUMNS), np.float32)
            file.write((part @ mix.astype(np.float32)).tobytes())
    timing, peak = program(FIT_FILE, str(path)).splitlines()
    seconds, log_likelihood = map(float, timing.split())
    return {
        "file_gb": path.stat().st_size / 1e9,
        "rows": rows,
        "seconds": seconds,
        "validation_log_likelihood": log_likelihood,
        "peak_resident_gb": float(peak) * 1024 / 1e9,
    }


def kills(times: int) -> dict[str, Any]:
    """Compare a fit killed `times` times with an uninterrupted one."""
    started = time.monotonic()
    run_to_end("alone")
    alone = time.monotonic() - started
    moments = random.Random(0)
    kill_count = 0
    for _ in range(times):
        kill_count += not finishes("killed", moments.uniform(0.05, 2 * alone / times))
    run_to_end("killed")
    one, other = (load_file(f"{folder}/model.safetensors") for folder in ("alone", "killed"))
    first, second = (Path(folder, "log.csv").read_text(encoding="utf-8").splitlines() for folder in ("alone", "killed"))
    return {
        "kills": kill_count,
        "seconds_alone": alone,
        "same_weights": one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one),
        "same_losses": without_seconds(first) == without_seconds(second),
        "epochs": len(second) - 1,
        "left_over": sorted(str(path) for path in Path("killed").glob(".*")),
    }


def shared(steps: int) -> list[dict[str, float]]:
    """Training rows per second of one process and of two with one thread each: medians of three runs."""
    rows = []
    for dim, units, batch in NETWORKS:
        size = (str(dim), str(units), str(batch), str(max(20, steps * 100 // batch)))
        runs = {count: [float(program(FIT_SHARED, *size, processes=count)) for _ in range(3)] for count in (1, 2)}
        rates = {count: sorted(values)[1] for count, values in runs.items()}
        rows.append({"D": dim, "H": units, "batch": batch, "one": rates[1], "two": rates[2]})
    return rows


def without_seconds(log: list[str]) -> list[list[str]]:
    """Fields of a log without the column of seconds."""
    return [[field for number, field in enumerate(line.split(",")) if number != 1] for line in log]


def run_to_end(folder: str) -> None:
    """Fit, or resume, until the end."""
    if not finishes(folder, None):
        raise RuntimeError(f"The fit in {folder} did not finish.")


def finishes(folder: str, after: float | None) -> bool:
    """Start or resume the fit and kill it `after` seconds, unless None; True if it finished before."""
    command = [sys.executable, "-c", textwrap.dedent(FIT_KILLED), folder]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None or process.stdout.readline() != "started\n":
            raise RuntimeError("The fit did not start.")
        if after is not None:
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
        return "ended" in process.stdout.read()


def program(text: str, *arguments: str, processes: int = 1) -> str:
    """Run a Python program, by torchrun if in several processes, and return its output."""
    path = Path("program.py")
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(path), *arguments]
    return subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True).stdout


def environment() -> dict[str, str]:
    """Environment with one thread per process and this package on the path."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    main()
