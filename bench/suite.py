"""`qwen-fused bench`: every bench of the project on one device, one table, one JSON, pictures, docs/performance.md.

Exit codes: 0 done, or no regression; 1 a bench refused a wrong result, or `--compare` found a regression;
2 an argument or a file is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import NoReturn

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
BENCHES = ("efe_loss", "grad_norm", "window", "window_qwen", "step")
# what the benches import beside this file, and the checkout's own package
sys.path[:0] = [str(BENCH), str(BENCH.parent)]


class Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        print(f"qwen-fused: bench: {message}", file=sys.stderr)
        raise SystemExit(2)


def arguments_of(line: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(prog="qwen-fused bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: under 3 minutes on 2 cores")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES), help="these benches alone")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: as many as torch takes")
    parser.add_argument("--out", type=Path, help="the JSON; default: bench/results/<device>[-quick].json")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="times of B over those of A; exit code 1 where something of ours is slower than by noise",
    )
    parser.add_argument("--redraw", action="store_true", help="pictures and docs/performance.md anew from results/")
    arguments = parser.parse_args(line)
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"threads must be at least 1, got {arguments.threads}")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Measure, write and draw."""
    import harness
    import torch
    from machine import ceilings, device_name, load, machine, slug

    from qwen_fused.common.device import resolve_device

    device = resolve_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    level = "quick" if arguments.quick else "full"
    path = arguments.out or RESULTS / f"{slug(device_name(device))}{'-quick' if arguments.quick else ''}.json"
    if not path.parent.is_dir() and arguments.out:
        raise ValueError(f"out must be a file in a folder that is there, got {path}")
    record = {"machine": machine(device), "level": level, "ceilings": ceilings(device)}
    print(describe(record), flush=True)
    rows, refused = kept(path, record, arguments.only), {}
    commit = f"{record['machine']['commit']}{'+' if record['machine']['dirty'] else ''}"
    for name in arguments.only:
        try:
            for comparison in importlib.import_module(f"bench_{name}").comparisons(level, device):
                found = harness.measure(comparison, level)
                harness.show(found)
                rows += [{**vars(row), "commit": commit, "load": load()} for row in found]
                write(path, record, rows, refused, device)
        except harness.WrongResult as error:
            refused[name] = str(error)
            print(f"\n{name}: refused: {error}", file=sys.stderr)
        except Exception as error:
            # the others' figures are wanted all the same
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            traceback.print_exc()
    write(path, record, rows, refused, device)
    print(f"\nwritten to {path}")
    draw(path)
    return int(bool(refused))


def write(path: Path, record: dict, rows: list[dict], refused: dict[str, str], device) -> None:
    """The result so far: what was measured stays when a run is cut short."""
    from machine import clocks, load

    # a machine's load while it measured belongs to the figures
    record["machine"] |= {"load_at_end": load(), "clocks_at_end": clocks(device)}
    record |= {"refused": refused, "rows": sorted(rows, key=lambda row: BENCHES.index(row["bench"]))}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def kept(path: Path, record: dict, renewed: list[str]) -> list[dict]:
    """Rows of the benches that this run leaves out, where the file is of the same device and torch."""
    if len(renewed) == len(BENCHES) or not path.is_file():
        return []
    from compare import read

    before = read(path)
    same = all(before["machine"][key] == record["machine"][key] for key in ("device", "threads", "torch"))
    return [row for row in before["rows"].values() if row["bench"] not in renewed] if same else []


def describe(record: dict) -> str:
    """Device, versions, ceilings in two lines."""
    m, c = record["machine"], record["ceilings"]
    return (
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}, commit {m['commit']}{'+' if m['dirty'] else ''}, "
        f"load {m['load']}\n"
        f"ceilings: copy {c['copy_gb_per_s']:.1f} GB/s, read {c['read_gb_per_s']:.1f} GB/s, "
        f"fp32 {c['fp32_gflop_per_s']:.0f} GFLOP/s; * is ours, x its time"
    )


def draw(path: Path) -> None:
    """The pictures beside a result, where there is something to draw them with."""
    if importlib.util.find_spec("matplotlib") is None:
        print("not drawn: matplotlib is not installed")
        return
    from draw import bars, roofline

    record = json.loads(path.read_text())
    for kind, picture in (("roofline", roofline), ("bars", bars)):
        to = path.with_name(f"{path.stem}-{kind}.png")
        if picture(record, to):
            print(f"drawn: {to}")


def main(line: list[str] | None = None) -> int:
    arguments = arguments_of(line)
    try:
        if arguments.compare:
            from compare import compare

            return compare(*arguments.compare)
        if arguments.redraw:
            from tables import refresh

            for path in sorted(RESULTS.glob("*.json")):
                draw(path)
            print(f"rewritten: {refresh(RESULTS)}")
            return 0
        return run(arguments)
    except (ValueError, OSError) as error:
        print(f"qwen-fused: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
