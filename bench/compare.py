"""`qwen-fused bench --compare A.json B.json`: what became slower from A to B."""

from __future__ import annotations

import json
from pathlib import Path

# below this, and where the middle three fifths of the rounds overlap, a difference is noise
TOLERATED = 1.10


def read(path: Path) -> dict:
    """A result of `qwen-fused bench`, its rows by bench, case and contender.

    Raises:
        ValueError: the file is none.
    """
    try:
        record = json.loads(path.read_text())
        return {**record, "rows": {(r["bench"], r["case"], r["who"]): r for r in record["rows"]}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise ValueError(f"{path} must be a result of qwen-fused bench, got what can't be read ({reason})") from None


def compare(before: Path, after: Path) -> int:
    """Print the ratios; 1 where something of ours is slower than by noise, else 0.

    Two ratios for each row: of the times, which the machine's load moves too, and of how a baseline compares with ours
    in its own run, which it hardly moves.

    Raises:
        ValueError: a file is no result, or the two have nothing in common.
    """
    a, b = read(before), read(after)
    common = [key for key in a["rows"] if key in b["rows"]]
    if not common:
        raise ValueError(f"compare must be given results with a bench in common, got {before} and {after}")
    for name, record in (("A", a), ("B", b)):
        m = record["machine"]
        dirty = "+" if m["dirty"] else ""
        print(f"{name}: {m['device']}, torch {m['torch']}, commit {m['commit']}{dirty}, load {m['load']}")
    if a["machine"]["device"] != b["machine"]["device"]:
        print("these are different devices: their ratios say nothing of the code")
    slower = []
    print(f"\n{'time B / A':>10}  {'baseline':>8}   what (baseline: the factor by which it is slower than ours, B / A)")
    for key in common:
        one, two = a["rows"][key], b["rows"][key]
        ratio, factor = two["ms"] / one["ms"], two["times_ours"] / one["times_ours"]
        worse = two["ours"] and ratio > TOLERATED and two["p20"] > one["p80"]
        if worse:
            slower.append(key)
        baseline = "" if two["ours"] else f"{factor:8.2f}"
        print(f"{ratio:10.2f}  {baseline:8}   {': '.join(key[:2])}, {key[2]}{'  SLOWER' if worse else ''}")
    missing = [key for key in a["rows"] if key not in b["rows"]]
    if missing:
        print(f"\n{len(missing)} rows of A are not in B, the first: {', '.join(missing[0])}")
    print(f"\n{len(slower)} of {sum(b['rows'][key]['ours'] for key in common)} figures of ours are slower")
    return int(bool(slower))
