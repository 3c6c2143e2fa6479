"""``python -m eapo_kernels.ops.cuda --build``: compile every kernel into the cache before its first
use. Needs no GPU.
"""

from __future__ import annotations

import argparse
import sys
import time

from ...errors import EapoError


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1, with one message, when a kernel does not compile, a package is missing or the
    cache cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m eapo_kernels.ops.cuda", description=__doc__)
    parser.add_argument("--build", action="store_true", required=True, help="fill the cache")
    parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        from . import build, tiles

        number = sum(1 for item in tiles.builds() if build.cubin(item, cache=build.cache_folder()))
    except ImportError as error:
        print(f"expected the packages of eapo-kernels[cuda], got: {error}", file=sys.stderr)
    except OSError as error:
        print(f"expected a cache folder (in XDG_CACHE_HOME) that can be written, got: {error}", file=sys.stderr)
    except EapoError as error:
        print(error, file=sys.stderr)
    else:
        print(f"{number} kernels in {build.cache_folder()}, {time.perf_counter() - start:.1f} s")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
