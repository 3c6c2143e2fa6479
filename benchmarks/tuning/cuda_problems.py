"""A CUDA kernel with operands of one shape: as ``problems``, with the launches of ``ops.cuda``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from eapo_kernels.ops.cuda import launch as cuda_launch
from eapo_kernels.ops.cuda import report
from eapo_kernels.ops.cuda.build import BuildError
from eapo_kernels.ops.cuda.launch import Launch
from eapo_kernels.ops.triton.online_softmax import finalize
from eapo_kernels.ops.triton.scaled_exp import row_offsets, scaled_exp_finalize

from .cuda_candidates import CudaSearch
from .problems import Problem, Results


class CudaProblem(Problem):
    """See ``Problem``. The offsets and the last step are Triton's."""

    search: CudaSearch

    def launch(self, tile: Tile) -> tuple[Launch, Callable[[], Results]]:
        """See ``Problem.launch``."""
        p, targets = self.projection, self.targets
        if self.search.kernel == "stream_statistics":
            launch, partial = cuda_launch.stream_statistics(
                p, targets, entropy=True, second_moments=False, budget=self._budget, tile=tile
            )
            return launch, lambda: self._finalized(finalize(partial))
        sums = cuda_launch.scaled_exp_sums(p, True, tile)
        row_offsets(p, targets, self.statistics.logp, sums)()
        matrix = self.matrix

        def compared() -> Results:
            yield "exponentials", matrix.clone(), self._expected_exponentials(sums)
            last, final, _ = scaled_exp_finalize(p, sums)
            last()
            yield from self._statistics(final.statistics)

        return cuda_launch.scaled_exp_gemm(p, targets, sums, matrix, tile=tile), compared

    def _outputs(self, launch: Launch) -> Iterator[Tensor]:
        sums = launch.tensors["sums"]
        assert sums is not None
        yield sums
        if launch.build.kernel == "scaled_exp_gemm":
            yield launch.boxes[2].matrix

    def prepare(self, tile: Tile) -> Callable[[], str | None]:
        """See ``search.Contest``. The launch is made now, compiled later."""
        build = self.launch(tile)[0].build
        return lambda: flaw(build)

    def spills_with_every_switch(self, tile: Tile) -> str | None:
        """Why the tile is not taken for launches with bias and second moments, or None."""
        build = self.launch(tile)[0].build
        return flaw(replace(build, bias=True, second_moments=build.kernel == "stream_statistics"))


def flaw(build: Build) -> str | None:
    """Why a build is not taken, or None: the same demands as those of tests/csrc on the shipped table."""
    try:
        code = report.usage(build).code
    except BuildError as error:
        return f"compiler: {str(error).splitlines()[0]}"
    return f"{code.spills} spills, {code.stack} bytes of stack" if code.spills or code.stack else None
