"""Result files as Markdown: one table a case and mode, then who could not run, then settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .bars import bars_table
from .groups import FLOOR, UNFUSED, Group, Result, Row, groups, is_gpu, is_ours, markdown_table, over, unique

_ERRORS = ("logp", "entropy", "d_hidden", "d_weight")
_PLAIN = ("gpu", "driver", "cuda", "torch", "python", "commit", "date", "clocks")
"""Keys of the environment that are not versions of other packages."""

MODES = {
    "fwd": "log-prob and entropy",
    "fwd_bwd": "loss and both gradients",
    "frozen_head": "loss and d_hidden",
    "half_zero_rows": "loss and both gradients, half of the tokens masked",
}


def result_section(result: Result, *, level: int = 2) -> str:
    """Everything about one result file, under a heading of the given level."""
    found, marks = groups(result), "#" * level
    env = result["environment"]
    lines = [f"{marks} {env['gpu']}, {env['date'][:10]}", "", environment_line(result), ""]
    if is_gpu(result):
        lines += [f"{marks}# Bars", "", *bars_table(found), ""]
    for group in found:
        if group.timed:
            title = f"{marks}# `{group.mode}`, {MODES[group.mode]}: {group.case}"
            lines += [title, "", case_line(group), "", *case_table(group, is_gpu(result)), ""]
    for title, rescue_ids in (("Could not run", absent(found)), ("Settings that differ from defaults", settings(found))):
        if rescue_ids:
            lines += [f"{marks}# {title}", "", *rescue_ids, ""]
    return "\n".join(lines).rstrip()


def environment_line(result: Result) -> str:
    """Device, versions, commit, date, and what the gate saw."""
    env, gate = result["environment"], result["gate"]
    known = [env["gpu"]]
    known += [
        f"{name} {env[key]}" for name, key in (("driver", "driver"), ("CUDA", "cuda"), ("torch", "torch")) if env.get(key)
    ]
    known += [f"{key} {value}" for key, value in env.items() if key not in _PLAIN and value]
    known += [f"Python {env['python']}", f"commit {env['commit']}", env["date"]]
    if env.get("clocks"):
        known.append(f"before the first run {clocks(env['clocks'])}")
    tests = gate.get("tests")
    seen = [f"{tests['passed']} tests passed, {tests['skipped']} skipped"] if tests else []
    seen.append(f"{len(gate['cases'])} cases and modes within the bounds")
    return f"{', '.join(known)}. Correctness gate green: {', '.join(seen)}."


def clocks(state: dict[str, float]) -> str:
    """SM clock, power and temperature, as far as they are known."""
    parts = []
    if "sm_mhz" in state:
        parts.append(f"SM clock {state['sm_mhz']:.0f} MHz")
    if "power_w" in state:
        limit = f" of {state['power_limit_w']:.0f}" if "power_limit_w" in state else ""
        parts.append(f"{state['power_w']:.0f}{limit} W")
    if "temperature_c" in state:
        parts.append(f"{state['temperature_c']:.0f} °C")
    return ", ".join(parts)


def case_line(group: Group) -> str:
    """What the inputs were like, and the GPU after the last round."""
    first = group.rows[0]
    line = f"Mean entropy {first['mean_entropy_nats']:.2f} nats, largest |logit| {first['largest_logit']:.1f}"
    state = clocks(first["clocks"])
    return f"{line}; after the last round {state}." if state else f"{line}."


def case_table(group: Group, gpu: bool) -> list[str]:
    """Who ran, fastest first. Milliseconds and rates only from a GPU."""
    errors = [name for name in _ERRORS if any(name in row["errors"] for row in group.timed)]
    columns: dict[str, Callable[[Row], str]] = {
        "provider": lambda row: f"**`{row['provider']}`**" if is_ours(row["provider"]) else f"`{row['provider']}`",
        "job": lambda row: short_job(row["job"]),
        "time / floor": lambda row: ratio(over(row, FLOOR)),
        "time / unfused": lambda row: ratio(over(row, UNFUSED)),
    }
    if gpu:
        columns["ms (p20-p80)"] = milliseconds
        columns["TFLOP/s"] = lambda row: f"{row['tflops_useful']:.0f}"
    columns["peak MiB"] = lambda row: mebibytes(row["peak_bytes"])
    columns |= {f"{name} error": lambda row, name=name: error(row["errors"].get(name)) for name in errors}  # type: ignore[misc]
    columns["rounds"] = lambda row: str(row["rounds"])
    return markdown_table(list(columns), [[cell(row) for cell in columns.values()] for row in group.timed], words=2)


def absent(found: list[Group]) -> list[str]:
    """Who could not run: every reason once, with the providers it stopped, and in how many of their cases if not in all."""
    tried: dict[str, int] = {}
    stopped: dict[str, dict[str, int]] = {}
    for group in found:
        for row in group.rows:
            name = row["provider"]
            tried[name] = tried.get(name, 0) + 1
            if row["error"]:
                names = stopped.setdefault(row["error"], {})
                names[name] = names.get(name, 0) + 1

    def who(name: str, times: int) -> str:
        return f"`{name}`" if times == tried[name] else f"`{name}` ({times} of {tried[name]} cases and modes)"

    return [f"- {reason}: {', '.join(who(*item) for item in names.items())}" for reason, names in stopped.items()]


def settings(found: list[Group]) -> list[str]:
    """The settings of those that ran, where they are not what a user gets who sets nothing."""
    rows = [row for group in found for row in group.timed if row["settings"] != "defaults"]
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row["settings"], []).append(row["provider"])
    return [f"- {', '.join(f'`{name}`' for name in unique(who))}: {what}" for what, who in names.items()]


def short_job(job: str) -> str:
    """A job in fewer letters."""
    for long, short in (("log-prob", "logp"), ("cross-entropy", "CE"), ("matrix products", "products")):
        job = job.replace(long, short)
    return job


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def milliseconds(row: Row) -> str:
    ms = row["ms"]
    digits = 1 if ms["p50"] >= 100 else 2 if ms["p50"] >= 1 else 3
    return f"{ms['p50']:.{digits}f} ({ms['p20']:.{digits}f}-{ms['p80']:.{digits}f})"


def mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def error(value: Any) -> str:
    """A relative error; NaN and infinities are kept as text in the file."""
    return "-" if value is None else f"{float(value):.1e}"
