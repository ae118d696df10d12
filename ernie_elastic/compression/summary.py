"""What `compress`, `decompress` and `info` say at their end: sizes, what was left alone and why, what was checked."""

from __future__ import annotations

from typing import Any

from ernie_elastic.compression.shard import MIN_WEIGHTS


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def compress_lines(report: dict[str, Any]) -> list[str]:
    """Lines of what `compress_directory` returned."""
    before, after = report["source_bytes"], report["model_bytes"]
    lines = [
        f"{report['out']}: {report['compressed']:,} of {_count(report['tensors'], 'tensor')} compressed, each of them "
        "decoded from the written file and compared with its source",
        f"weight files: {before:,} -> {after:,} bytes ({100 * after / before:.2f} %)",
    ]
    if report["compressed"]:
        bits, bound = report["bits_per_weight"], report["entropy_bits"]
        lines.append(f"compressed weights: 16 -> {bits:.3f} bits each (their exponents' entropy allows {bound:.3f})")
    kept = dict(report["kept"])
    plain, worse = kept.pop("BF16", 0), report["not_smaller"]
    reasons = [f"{number:,} {dtype} (only BF16 is compressed)" for dtype, number in kept.items()]
    if plain - worse:
        reasons.append(f"{plain - worse:,} BF16 (under 2 dimensions or {MIN_WEIGHTS} weights)")
    if worse:
        reasons.append(f"{worse:,} BF16 (a stream would not be smaller)")
    return [*lines, f"left as they are: {', '.join(reasons) or 'no tensor'}"]


def decompress_lines(report: dict[str, Any]) -> list[str]:
    """Lines of what `decompress_directory` returned."""
    return [
        f"{report['out']}: {_count(report['files'], 'file')} restored, {report['bytes']:,} bytes",
        f"checked: {_count(report['streams'], 'stream')} by checksum, {_count(report['verified'], 'restored file')} by "
        "the SHA-256 of what was compressed"
        + (", every file read by the SHA-256 of the manifest" if report["manifest"] else "; there is no manifest"),
    ]


def info_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of what `directory_info` returned, and its total."""
    width = max(len(row["name"]) for row in rows) if rows else 0
    lines = [f"{'tensor':{width}}  {'shape':>18}  {'layout':>13}  bits/weight  bound  checksum"]
    for row in rows:
        bits = " ".join(
            f"{row[key]:>{size}.3f}" if row.get(key) else " " * size
            for key, size in (("bits_per_weight", 11), ("entropy_bits", 6))
        )
        shape = "x".join(str(size) for size in row["shape"])
        lines.append(f"{row['name']:{width}}  {shape:>18}  {row['layout']:>13}  {bits}  {row.get('checksum') or ''}")
    streams = [row for row in rows if row["layout"] != "stored"]
    weights, stored = sum(row["weights"] for row in streams), sum(row["bytes"] for row in rows)
    plain = stored - sum(row["bytes"] for row in streams) + 2 * weights
    total = f"total: {_count(len(rows), 'tensor')}, {sum(row['weights'] for row in rows):,} weights, {stored:,} bytes"
    if streams:
        bits = 8 * sum(row["bytes"] for row in streams) / weights
        total += (
            f" for {plain:,} ({100 * stored / plain:.2f} %); {len(streams):,} compressed at {bits:.3f} bits/weight, "
            "every checksum right"
        )
    return [*lines, total]
