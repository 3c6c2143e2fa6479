"""An invented result file with distinct numbers, and a parser of Markdown tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.report import unique
from benchmarks.results import ResultFile

Result = dict[str, Any]

FACTORS = {
    "bare_gemms": 1.0,
    "unfused_eager": 2.5,
    "unfused_compile": 2.0,
    "eapo_triton_one_pass": 1.05,
    "eapo_triton_op": 1.30,
    "liger_flce": 2.3,
    "liger_scaled_ce": 1.40,
    "verl_torch": 3.1,
    "trl_fused_head": 2.7,
    "cce": 1.8,
}
"""Time over the floor in every case, unless a case says otherwise."""

FORWARD_TOO = ("bare_gemms", "unfused_eager", "unfused_compile", "eapo_triton_op", "liger_scaled_ce", "verl_torch", "cce")

CLOCKS = {"sm_mhz": 1755.0, "power_w": 689.4, "power_limit_w": 700.0, "temperature_c": 61.0}

MIB = 2**20


def make_row(provider: str, mode: str, n: int, d: int, v: int, inputs: str, factor: float, clocks: dict[str, float]) -> Result:
    floor = n * d * v / 1e11
    ms = factor * floor
    steep = {"uniform": 0.5, "peaked": 1.0, "steep": 2.0}[inputs]
    errors = {"logp": 1e-5 * factor * steep, "entropy": 2e-5} if provider.endswith(("_op", "_ce", "eager", "compile")) else {}
    if mode != "fwd":
        errors = {**errors, "d_hidden": 3e-3 * steep, "d_weight": 4e-3 * steep}
    return {
        "provider": provider,
        "mode": mode,
        "job": "mean cross-entropy" if provider == "liger_flce" else "log-prob, entropy, policy loss",
        "objective": "cross_entropy" if provider == "liger_flce" else "policy",
        "settings": "reduction none" if provider == "cce" else "defaults",
        "shape": {"N": n, "D": d, "V": v, "dtype": "bfloat16"},
        "inputs": inputs,
        "memory_budget": None,
        "mean_entropy_nats": 5.94,
        "largest_logit": 16.0 * steep,
        "errors": {} if provider == "bare_gemms" else errors,
        "peak_bytes": round(n * factor) * MIB,
        "ms": {"p20": 0.98 * ms, "p50": ms, "p80": 1.03 * ms},
        "rounds": 20,
        "tflops_useful": 600 / factor,
        "time_over": {"bare_gemms": factor, "unfused_eager": factor / 2.5},
        "clocks": clocks,
        "error": None,
    }


def failed_row(row: Result, reason: str) -> Result:
    return row | {
        "errors": {},
        "peak_bytes": None,
        "ms": None,
        "rounds": 0,
        "tflops_useful": None,
        "time_over": {},
        "error": reason,
    }


def make_result(gpu: str, date: str, rows: list[Result], tests: Result | None = None) -> Result:
    on_gpu = not gpu.startswith("CPU")
    environment = {
        "gpu": gpu,
        "driver": "580.1" if on_gpu else None,
        "cuda": "13.0" if on_gpu else None,
        "torch": "2.13.0",
        "python": "3.11.7",
        "liger-kernel": "0.8.5",
        "trl": None,
        "commit": "abc1234",
        "date": date,
        "clocks": CLOCKS if on_gpu else {},
    }
    keys = unique(f"{row['mode']} {row['inputs']} {row['shape']}" for row in rows)
    gate = {"green": True, "red": [], "tests": tests, "cases": {key: {"green": True, "red": []} for key in keys}}
    return {"environment": environment, "gate": gate, "rows": rows}


def make_case(mode: str, n: int, d: int, v: int, inputs: str = "peaked", **factors: float) -> list[Result]:
    names = FORWARD_TOO if mode == "fwd" else tuple(FACTORS)
    rows = [make_row(name, mode, n, d, v, inputs, factors.get(name, FACTORS[name]), CLOCKS) for name in names]
    missing = make_row("verl_triton", mode, n, d, v, inputs, 1.0, CLOCKS)
    return [
        *rows,
        failed_row(missing, "verl is not installed"),
        failed_row(missing | {"provider": "quack"}, "no module named quack"),
    ]


def save(result: Result, folder: Path) -> Path:
    return ResultFile(result["environment"], result["gate"], result["rows"]).save(folder)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table of a text as rows of cells, the rule left out."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    return [[cells(line) for line in table.splitlines() if not line.startswith("| ---")] for table in found]
