"""``python -m trainer COMMAND``.

commands:
  train --config RECIPE.toml [--section.key value ...]   train, evaluate before and after, save, draw the report
  eval  --config RECIPE.toml [--model.path DIR ...]      evaluate a model or a saved adapter
  report RUN [RUN ...] [--out DIR]                       draw curves and a Markdown page from run directories
  print-config [--config RECIPE.toml] [overrides]        print the resolved configuration as TOML
  demo [overrides]                                       a real EAPO run in minutes, without GPU or network

``train --help`` lists every setting. Exit code 2: a wrong recipe, argument, file or model. 130: interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from eapo_kernels import EapoError

from .errors import ConfigError, DataError, ModelError
from .settings import parse_config, to_toml

DEMO = Path(__file__).parent / "recipes" / "demo.toml"

DEMO_NOTICE = """\
eapo_kernels demo. What it is: SmolLM2-135M-Instruct, dequantized from a 4-bit file, learns with EAPO to define medical
terms the way WordNet does. The reward is similarity to WordNet's gloss (sentence embedding + ROUGE-L), not correctness.
A method at work on a small machine: not a medical model, not a benchmark, not medical advice.
"""


def _train(arguments: Sequence[str]) -> int:
    config = parse_config(arguments)
    from .loop import train

    return 0 if train(config) else 130


def _eval(arguments: Sequence[str]) -> int:
    config = parse_config(arguments, prog="python -m trainer eval")
    from .eval_command import evaluate_model

    return 0 if evaluate_model(config) else 130


def _report(arguments: Sequence[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m trainer report", description="Draw curves and a Markdown page.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories; several are drawn into one picture")
    parser.add_argument("--out", type=Path, help="where curves.png and report.md go (default: the first run)")
    options = parser.parse_args(arguments)
    from .report import write_report

    for path in write_report(options.runs, options.out or options.runs[0]):
        print(path)
    return 0


def _print_config(arguments: Sequence[str]) -> int:
    print(to_toml(parse_config(arguments, prog="python -m trainer print-config")), end="")
    return 0


def _demo(arguments: Sequence[str]) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers and datasets are imported
    config = parse_config(arguments, recipe=DEMO, prog="python -m trainer demo")
    print(DEMO_NOTICE, flush=True)
    from .loop import train

    return 0 if train(config) else 130


COMMANDS = {"train": _train, "eval": _eval, "report": _report, "print-config": _print_config, "demo": _demo}


def main(arguments: Sequence[str]) -> int:
    """Run one command; errors become one line on stderr."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise ConfigError(f"command: expected one of {', '.join(COMMANDS)}, got {name!r}")
        return COMMANDS[name](rest)
    except (ConfigError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EapoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
