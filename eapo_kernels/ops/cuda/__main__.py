"""``python -m eapo_kernels.ops.cuda``: build every kernel before its first use, or say what each compiles to. No GPU."""

from __future__ import annotations

import argparse
import sys
import time

from ...errors import EapoError
from . import configs


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1, with one message, when a kernel does not compile, a package is missing or the cache cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m eapo_kernels.ops.cuda", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--build", action="store_true", help="fill the cache")
    action.add_argument("--report", action="store_true", help="print registers, spills, shared memory and instructions")
    chosen = parser.parse_args(arguments)
    try:
        run = _print_report if chosen.report else _build
        run()
    except ImportError as error:
        print(f"expected the packages of eapo-kernels[cuda], for --report also triton, got: {error}", file=sys.stderr)
    except OSError as error:
        print(f"expected a cache folder (in XDG_CACHE_HOME) that can be written, got: {error}", file=sys.stderr)
    except EapoError as error:
        print(error, file=sys.stderr)
    else:
        return 0
    return 1


def _print_report() -> None:
    from . import build, report

    library = build.compiler()
    print(f"{build.ARCHITECTURE}, NVRTC {build.compiler_version()}: {library.abs_path} ({library.found_via})\n")
    for row in report.rows():
        print(row, flush=True)


def _build() -> None:
    from . import build

    start = time.perf_counter()
    number = sum(1 for item in configs.builds() if build.cubin(item))
    print(f"{number} kernels in {build.cache_folder()}, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
