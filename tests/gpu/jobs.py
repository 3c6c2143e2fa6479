"""The calls that a training step makes, as functions of static inputs: what graphs capture, streams
run and tools watch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from eapo_kernels import EAPOConfig, Options, TokenBatch, available_backends, eapo_loss, token_stats
from eapo_kernels.testing import Inputs, make_inputs

Job = Callable[[Inputs, TokenBatch, Options], list[Tensor]]

SIZES = {"cuda": (1024, 512, 50257), "cpu": (24, 32, 301)}
"""(N, D, V) by device: middle, or tiny."""


def job_inputs(device: str, seed: int = 0, size: tuple[int, int, int] | None = None) -> tuple[Inputs, TokenBatch]:
    """bf16 inputs and a batch of 8 responses in two groups, none of whose tokens is masked."""
    n, d, v = size or SIZES[device]
    inputs = make_inputs(n, d, v, dtype=torch.bfloat16, seed=seed, device=device)
    g = torch.Generator().manual_seed(seed + 1)
    rewards, old_logp = torch.rand(8, generator=g).to(device), -4 * torch.rand(n, generator=g).to(device)
    ids = torch.arange(n, device=device) * 8 // n
    return inputs, TokenBatch(inputs.targets, ids, rewards, torch.arange(8, device=device) // 4, old_logp=old_logp)


def _forward(backend: str) -> Job:
    @torch.no_grad()
    def job(inputs: Inputs, batch: TokenBatch, options: Options) -> list[Tensor]:
        stats = token_stats(inputs.hidden, inputs.weight, batch.targets, second_moments=True, backend=backend, options=options)
        return [values for values in stats if values is not None]

    return job


def _op(backend: str) -> Job:
    def job(inputs: Inputs, batch: TokenBatch, options: Options) -> list[Tensor]:
        leaves = inputs.leaves()
        stats = token_stats(*leaves, batch.targets, backend=backend, options=options)
        loss = stats.logp.sum() + 0.1 * stats.entropy.sum() - 0.01 * stats.lse.square().sum()
        return [*(s.detach() for s in stats[:3]), *torch.autograd.grad(loss, leaves)]

    return job


def _loss(backend: str, schedule: str, config: EAPOConfig | None = None) -> Job:
    def job(inputs: Inputs, batch: TokenBatch, options: Options) -> list[Tensor]:
        leaves = inputs.leaves()
        out = eapo_loss(*leaves, batch, positive_weight=0.7, config=config, schedule=schedule, backend=backend, options=options)
        return [out.loss.detach(), out.metrics["eapo/entropy"], *torch.autograd.grad(out.loss, leaves)]

    return job


def _rescued(backend: str) -> Job:
    """Every fifth old log-prob is so wrong that E is out of range with its offset and the row is
    rescued (``scaled_exp_rescue``).

    The dual clip keeps the loss of these rows finite.
    """
    job = _loss(backend, "one_pass", EAPOConfig(dual_clip=3.0))

    def spoiled(inputs: Inputs, batch: TokenBatch, options: Options) -> list[Tensor]:
        fifth = torch.arange(batch.targets.numel(), device=batch.targets.device) % 5 == 0
        return job(inputs, replace(batch, old_logp=torch.where(fifth, -80.0, batch.old_logp)), options)

    return spoiled


BACKENDS = ["torch", "triton"]
"""Those that run here; without a GPU Triton's kernels are interpreted, and the CUDA kernels
emulated by their own tests."""

if torch.cuda.is_available():
    BACKENDS = [name for name, reason in available_backends("cuda").items() if reason is None]

JOBS: dict[str, Job] = {}
for _backend in BACKENDS:
    JOBS |= {
        f"{_backend}-forward": _forward(_backend),
        f"{_backend}-op": _op(_backend),
        f"{_backend}-autograd": _loss(_backend, "autograd"),
        f"{_backend}-one_pass": _loss(_backend, "one_pass"),
        f"{_backend}-one_pass-entropy": _loss(_backend, "one_pass", EAPOConfig(entropy_coef=0.01)),
        f"{_backend}-one_pass-rescued": _rescued(_backend),
    }
"""By name: backend and what is run. All results are tensors: statistics or loss first, then
gradients."""
