"""The configuration tree: frozen dataclasses, a sentence under every field, checked when they are
built.

``settings.parse_config`` fills it from a TOML recipe and from overrides.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from eapo_kernels import Method

from .checks import check, section
from .loss import EntropyWeightConfig, LossConfig
from .model import DataConfig, LoraConfig, ModelConfig
from .rewards import RewardsConfig
from .run import CheckpointConfig, EvalConfig, LogConfig, OptimConfig
from .sampling import RolloutConfig


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str = "run"
    """The run's files go to <out>/<name>."""
    out: str = "runs"
    """Directory of all runs."""
    overwrite: bool = False
    """Replace a run of the same name instead of raising an error."""
    resume: str = ""
    """auto: resume from the latest valid checkpoint of the run of this name, or start a new run
    where there is none. Or the path of one of its checkpoints. Empty: start a new run."""
    seed: int = 0
    """Seed of everything: order of prompts, initial adapter weights, sampling of completions."""
    steps: int = 100
    """Training steps; each samples completions and updates on them."""
    samples_per_step: int = 2
    """Completions of each step written to samples.jsonl: the best, the worst, the second best, and
    so on."""
    diagnose_every: int = 1
    """Steps between measurements of predicted and actual entropy change of an update (one more
    forward pass over the completions of the step); 0 for none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eapo: EntropyWeightConfig = field(default_factory=EntropyWeightConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check("/" not in self.name and self.name not in ("", ".", ".."), "name", "the name of a directory in out", self.name)
        check(self.steps >= 1, "steps", "at least 1", self.steps)
        check(self.diagnose_every >= 0, "diagnose_every", "at least 0", self.diagnose_every)
        with section("rollout"):
            self.loss.hook().responses(self.rollout.responses)
        updates = self.rollout.prompts * self.rollout.responses
        expected = f"at most the {updates} completions of a step"
        check(self.optim.minibatches <= updates, "optim.minibatches", expected, self.optim.minibatches)
        if self.method().config.entropy_top_p is not None:
            supported = self.rollout.sampling(self.rollout.responses, self.seed).support
            expected = f"False with {self.loss.method}, whose entropy bonus is that of a nucleus of the whole vocabulary"
            check(not supported, "rollout.record_support", expected, supported)

    def method(self) -> Method:
        """The objective with all its numbers."""
        method = self.loss.build(fixed_length=self.rollout.max_new_tokens)
        return replace(method, controller_settings=asdict(self.eapo)) if method.controller == "entropy_ratio" else method
