"""All settings of a run. ``settings.parse_config`` fills them from a TOML recipe and from flags."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from ..errors import check
from .loss import EntropyWeightConfig, LossConfig
from .model import DataConfig, LoraConfig, ModelConfig
from .rewards import RewardsConfig
from .run import CheckpointConfig, EvalConfig, LogConfig, OptimConfig
from .sampling import RolloutConfig
from .section import Count, Natural, Section

if TYPE_CHECKING:
    from eapo_kernels import Method


class Config(Section):
    """One run."""

    name: str = "run"
    """The run's files go to <out>/<name>."""
    out: str = "runs"
    """Directory of all runs."""
    overwrite: bool = False
    """Replace a run of the same name instead of raising an error."""
    resume: str = ""
    """auto: resume from the latest valid checkpoint of the run of this name, or start a new run where there is none. Or the
    path of one of its checkpoints. Empty: start a new run."""
    seed: Natural = 0
    """Seed of everything: order of prompts, initial adapter weights, sampling of completions."""
    steps: Count = 100
    """Training steps; each samples completions and updates on them."""
    samples_per_step: Natural = 2
    """Completions of each step written to samples.jsonl: the best, the worst, the second best, and so on."""
    diagnose_every: Natural = 0
    """Steps between measurements of predicted and actual entropy change of an update (one more forward pass over the
    completions of the step); 0 for none."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    loss: LossConfig = LossConfig()
    eapo: EntropyWeightConfig = EntropyWeightConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        """What several settings must satisfy together. Only here the library is imported."""
        named = not {"/", "\0"} & {*self.name} and self.name not in ("", ".", "..") and len(os.fsencode(self.name)) <= 200
        check(named, "name", "the name of a directory in out", self.name)
        updates = self.rollout.prompts * self.rollout.responses
        expected = f"at most the {updates} completions of a step"
        check(self.optim.minibatches <= updates, "optim.minibatches", expected, self.optim.minibatches)
        self.loss.check()
        compared = [name for name in self.rewards.functions if name in ("similarity", "rouge", "exact_match", "math_verify")]
        if compared and not self.data.columns.answer:
            check(False, "data.columns.answer", f"the column of the reference answers that {compared[0]} compares with", "")
        if self.method().config.entropy_top_p is not None:
            supported = self.rollout.sampling(self.rollout.responses, self.seed).support
            expected = f"False with {self.loss.method}, whose entropy bonus is that of a nucleus of the whole vocabulary"
            check(not supported, "rollout.record_support", expected, supported)
        return self

    def resample_rounds(self) -> int:
        """``rollout.resample_rounds``, or the method's default."""
        own = self.rollout.resample_rounds
        return own if own is not None else 2 if self.loss.method == "dapo" else 0

    def method(self) -> Method:
        """The objective with all its numbers."""
        method = self.loss.build(fixed_length=self.rollout.max_new_tokens)
        return replace(method, controller_settings=self.eapo.model_dump()) if method.controller == "entropy_ratio" else method
