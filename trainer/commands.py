"""The commands. Heavy packages are imported only after the arguments have been checked."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .config.settings import parse_config, to_toml
from .errors import ConfigError, DataError, ModelError, RemoteCrash, RemoteRankError, TrainerError, check

DEMO = Path(__file__).parent / "recipes" / "demo.toml"

DEMO_NOTICE = """\
eapo_kernels demo. What it is: SmolLM2-135M-Instruct, dequantized from a 4-bit file, learns with EAPO to define medical
terms the way WordNet does. The reward is similarity to WordNet's gloss (sentence embedding + ROUGE-L), not correctness.
A method at work on a small machine: not a medical model, not a benchmark, not medical advice.
"""


def _train(arguments: Sequence[str], recipe: Path | None = None, prog: str = "python -m trainer train") -> int:
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dry-run", nargs="?", type=int, const=int(os.environ.get("WORLD_SIZE", "1")), metavar="PROCESSES",
                        help="check everything that needs no weights, and estimate the memory of each process")  # fmt: skip
    options, rest = _split(parser, arguments)
    config, processes = parse_config(rest, recipe=recipe, prog=prog), options.dry_run
    check(bool(config.data.train), "data.train", "training prompts", config.data.train)
    if processes is not None:
        check(processes >= 1, "--dry-run", "a number of processes", processes)
        from .dry_run import dry_run

        if os.environ.get("RANK", "0") == "0":
            dry_run(config, processes)
        return 0
    from .loop import train

    return 0 if train(config) else 130


def _demo(arguments: Sequence[str]) -> int:
    if not {"-h", "--help"} & set(arguments):
        print(DEMO_NOTICE, flush=True)
    return _train(arguments, DEMO, "python -m trainer demo")


def _eval(arguments: Sequence[str]) -> int:
    prog = "python -m trainer eval"
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False, exit_on_error=False)
    about = "a run, of which the saved model is evaluated, or RUN/checkpoints/NAME; without it --config and --model.path decide"
    parser.add_argument("--run", type=Path, help=about)
    options, rest = _split(parser, arguments)
    if options.run is None:
        config, checkpoint = parse_config(rest, prog=prog), None
    else:
        check("--config" not in rest, "--config", "nothing together with --run (its recipe is the run's)", "--config")
        from .runs.locate import locate

        run, checkpoint = locate(options.run)
        config = parse_config(rest, recipe=run / "config.toml", prog=prog)
        name = f"{run.name}-eval" + (f"-{checkpoint.name}" if checkpoint else "")  # beside the run
        config = config.replace(out=str(run.parent), name=name, overwrite=True, resume="")
        config = config if checkpoint else config.replace(model={"path": str(run / "model")})
    from .evaluation.evaluate import evaluate_model

    return 0 if evaluate_model(config, checkpoint) else 130


def _split(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The parser's own options, and the remaining arguments, which are settings. Prints the
    parser's help where it was asked for.
    """
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help())
    try:
        return parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"command line: {error}") from None


def _export(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer export", description="Write a folder that transformers loads.")
    parser.add_argument("source", type=Path, help="directory of a run (the model it saved), or RUN/checkpoints/step-...")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty directory")
    parser.add_argument("--dtype", default="float32", help="float32 (default, as trained) or bfloat16")
    options = parser.parse_args(arguments)
    from .runs.saved import export

    print(export(options.source, options.out, options.dtype))
    return 0


def _report(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer report", description="Draw curves and a Markdown page.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, help="where the page and its figures go (default: the first run)")
    options = parser.parse_args(arguments)
    from .evaluation.report import write_report

    for path in write_report(options.runs, options.out or options.runs[0]):
        print(path)
    return 0


def _print_config(arguments: Sequence[str]) -> int:
    print(to_toml(parse_config(arguments, prog="python -m trainer print-config")), end="")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train, "eval": _eval, "export": _export, "report": _report,
    "print-config": _print_config, "demo": _demo,
}  # fmt: skip
SINGLE_PROCESS = ("export", "report")
"""Commands that refuse to run under torchrun."""


def run(name: str, arguments: Sequence[str]) -> int:
    """Run the command ``name``; errors become one line on stderr and an exit code."""
    try:
        if name not in COMMANDS:
            raise ConfigError(f"command: expected one of {', '.join(COMMANDS)}, got {name!r}")
        processes = os.environ.get("WORLD_SIZE", "1")
        check(name not in SINGLE_PROCESS or processes == "1", name, "one process, without torchrun", f"{processes} processes")
        return COMMANDS[name](arguments)
    except (RemoteRankError, RemoteCrash):
        return 1
    except BrokenPipeError:  # the reader of the output has gone: train --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not isinstance(error, TrainerError):
            from eapo_kernels import EapoError  # imported before, by what raised it

            if not isinstance(error, EapoError):
                raise
        notes = getattr(error, "__notes__", [])  # from ``ranks.init_distributed``; earlier errors are the same on all ranks
        if notes or os.environ.get("RANK", "0") == "0":
            print("; ".join([f"error: {error}", *reversed(notes)]), file=sys.stderr)
        return 2 if isinstance(error, ConfigError | DataError | ModelError) else 1
    except KeyboardInterrupt:
        return 130
