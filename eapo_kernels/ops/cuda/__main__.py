"""``python -m eapo_kernels.ops.cuda``: build every kernel before its first use, or say what each compiles to. No GPU."""

from __future__ import annotations

import argparse
import sys
import time

from . import build, configs, report


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when a kernel does not compile."""
    parser = argparse.ArgumentParser(prog="python -m eapo_kernels.ops.cuda", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--build", action="store_true", help="fill the cache")
    action.add_argument("--report", action="store_true", help="print registers, spills, shared memory and instructions")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.report:
            library = build.compiler()
            print(f"{build.ARCHITECTURE}, NVRTC {build.compiler_version()}: {library.abs_path} ({library.found_via})\n")
            for row in report.rows():
                print(row, flush=True)
        else:
            start = time.perf_counter()
            number = sum(1 for item in configs.builds() if build.cubin(item))
            print(f"{number} kernels in {build.cache_folder()}, {time.perf_counter() - start:.1f} s")
    except build.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
