"""Estimates as text: a table of one run, of a pipeline's stages, and of a finished run against its prediction."""

from typing import Any

ON_A_CPU = "within a quarter: libraries and the C library's allocator differ between machines"
SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def size(number: float | None) -> str:
    """Write bytes with a decimal unit: 1.23 GB is 1.23 x 10^9 bytes."""
    if number is None:
        return "-"
    for scale, letter in SCALES:
        if number >= scale:
            return f"{number / scale:,.2f} {letter}B"
    return f"{number:,.0f} B"


def count(number: float | None) -> str:
    """Write a count shortly: 8.03 B, 1.2 M."""
    if number is None:
        return "-"
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:,.2f} {letter}"
    return f"{number:,.0f}"


def duration(hours: float | None) -> str:
    """Write hours, in minutes or seconds where they are few."""
    if hours is None:
        return "-"
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


def operations(flops: float | None) -> str:
    """Write FLOPs in powers of ten."""
    return "-" if flops is None else f"{flops:.2e}"


def single(found: dict[str, Any]) -> str:
    """Write one estimate, metric by metric."""
    what = f"task={found['task']}" + (f" loss={found['loss']}" if found["loss"] else "")
    lines = [f"estimate of {what}: strategy {found['strategy']}, {found['devices']} device(s); 1 GB = 10^9 bytes"]
    trained = f", trained {count(found['trainable'])}" if found["task"] == "train" else ""
    lines += [row("parameters", count(found["parameters"]), f"in the embedding {count(found['embedding'])}{trained}")]
    if found.get("frozen_models"):
        each = ", ".join(f"{key} {count(number)}" for key, number in found["frozen_models"].items())
        lines += [row("frozen models", count(sum(found["frozen_models"].values())), f"asked while it trains: {each}")]
    lines += [
        row(
            "tokens", count(found["tokens"]), f"{count(found['response_tokens'])} of them responses; {found['lengths']}"
        )
    ]
    if found["flops"]:
        parts = ", ".join(
            f"{name} {operations(value)}" for name, value in found["flops"].items() if value and name != "total"
        )
        lines += [
            row(
                "FLOPs", operations(found["flops"]["total"]), f"{parts}; {operations(found['flops_per_token'])} a token"
            )
        ]
    lines += ["memory of a device"]
    lines += [row(f"  {name}", size(value)) for name, value in found["memory"].items()]
    lines += [row("  peak", size(found["peak_bytes"]), found["peak_phase"])]
    lines += [row(f"  {name}", size(value)) for name, value in found["process"].items()]
    lines += [row("  the process", size(found["device_bytes"]), ON_A_CPU)] if found["process"] else []
    limit = found["device_memory_gb"]
    if limit:
        over = found["device_bytes"] - limit * 1e9
        lines += [
            row("", f"does not fit: {size(over)} more than {limit:g} GB" if over > 0 else f"fits into {limit:g} GB")
        ]
    if found["disk_bytes"] is not None:
        lines += [row("cache on disk", size(found["disk_bytes"]))]
    speed = "set estimate.tokens_per_second, or estimate.flops_per_second_per_device, or estimate.measure=true"
    lines += [row("time", duration(found["hours"]), speed if found["hours"] is None else speed_of(found))]
    return "\n".join(lines)


def row(name: str, value: str, note: str = "") -> str:
    """Write a metric with its name and a note."""
    return f"  {name:<30}{value:>12}{'   ' + note if note else ''}".rstrip()


def speed_of(found: dict[str, Any]) -> str:
    """Say what the hours were computed from."""
    if found["tokens_per_second"]:
        return f"at {found['tokens_per_second']:,.0f} tokens/s over all devices"
    kind = "; decoding one token at a time is slower than its FLOPs say" if found["task"] == "generate" else ""
    return f"from FLOPs and the given speed of a device{kind}"


HEAD = ("stage", "strategy", "devices", "parameters", "tokens", "FLOPs", "memory of a device", "at", "disk", "time")


def table(stages: list[tuple[str, dict[str, Any] | str]]) -> str:
    """Write the stages of a pipeline as a Markdown table, what does not fit, and the sum of hours and bytes."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for label, found in stages:
        if isinstance(found, str):
            lines.append(f"| {label} | not estimated: {found} |" + " |" * (len(HEAD) - 2))
            continue
        cells = (
            label,
            found["strategy"],
            str(found["devices"]),
            count(found["parameters"]),
            count(found["tokens"]),
            operations(found["flops"]["total"] if found["flops"] else None),
            size(found["device_bytes"]),
            found["peak_phase"],
            size(found["disk_bytes"]),
            duration(found["hours"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    known = [found for _, found in stages if isinstance(found, dict)]
    hours, disk = [f["hours"] for f in known if f["hours"]], sum(f["disk_bytes"] or 0 for f in known)
    lines += ["", f"in all {duration(sum(hours)) if hours else '- h'}, {size(disk) if disk else '-'} of teacher caches"]
    return "\n".join(
        [*lines, *(broken(label, found) for label, found in stages if isinstance(found, dict) and too_large(found))]
    )


def too_large(found: dict[str, Any]) -> bool:
    """Tell whether the peak is above the given memory of a device."""
    return bool(found["device_memory_gb"]) and found["device_bytes"] > found["device_memory_gb"] * 1e9


def broken(label: str, found: dict[str, Any]) -> str:
    """Say by how much a stage does not fit and what is largest in it."""
    largest = sorted({**found["memory"], **found["process"]}.items(), key=lambda term: -term[1])[:3]
    parts = ", ".join(f"{name} {size(value)}" for name, value in largest)
    return f"{label} does not fit into {found['device_memory_gb']:g} GB: {size(found['device_bytes'])} ({parts})"


def used_bytes(actual: dict[str, Any]) -> int:
    """Return the peak of the largest process: all that it held on a CPU, what torch allocated on a GPU."""
    return max(actual["peak_bytes"])


def cost_table(runs: list[tuple[str, dict[str, Any] | str]]) -> str:
    """Write prediction and measurement of several runs as a Markdown table."""
    lines = [
        "| stage | memory of a device, predicted | actual | tokens, predicted | actual | time, actual | tokens/s |",
        "|---" * 7 + "|",
    ]
    for label, found in runs:
        if isinstance(found, str):
            lines.append(f"| {label} | not estimated: {found} |" + " |" * 5)
            continue
        predicted, actual = found["predicted"], found["actual"]
        cells = (
            size(predicted["device_bytes"]),
            size(used_bytes(actual)),
            count(predicted["tokens"]),
            count(actual["tokens"]),
            duration(actual["seconds"] / 3600),
            f"{actual['tokens_per_second']:,.0f}",
        )
        lines.append("| " + " | ".join((label, *cells)) + " |")
    note = (
        "Memory on a CPU: all that a process held, libraries too. Responses sampled while training are not predicted."
    )
    return "\n".join([*lines, "", note])


def comparison(found: dict[str, Any]) -> str:
    """Write prediction and measurement of a finished run side by side."""
    predicted, actual = found["predicted"], found["actual"]
    used = used_bytes(actual)
    ratio = predicted["device_bytes"] / max(1, used)
    base = max(actual["baseline_bytes"])
    what = f"{size(base)} of it before the model was loaded" if base else "allocated by torch"
    lines = [
        f"{found['run']}: predicted and actual ({actual['strategy']}, {actual['devices']} device(s))",
        row("peak memory, predicted", size(predicted["device_bytes"]), predicted["peak_phase"]),
        row("peak memory, actual", size(used), f"{what}; predicted is {ratio:.2f} of it"),
        row("tokens, predicted", count(predicted["tokens"]), predicted["lengths"]),
        row("tokens, actual", count(actual["tokens"])),
        row("time, predicted", duration(predicted["hours"])),
        row(
            "time, actual",
            duration(actual["seconds"] / 3600),
            f"{actual['tokens_per_second']:,.0f} tokens/s, evaluation and saving included",
        ),
        row(
            "FLOPs a second, actual",
            operations(predicted["flops"]["total"] / actual["seconds"] if predicted["flops"] else None),
        ),
    ]
    return "\n".join(lines)
