"""The configuration tree: frozen dataclasses, a sentence under every field, checked when they are built.

``settings.parse_config`` fills it from a TOML recipe and from overrides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import tyro

from eapo_kernels import METHODS, EAPOConfig, EapoError, EntropyRatio, Method, get_method
from eapo_kernels.objectives.controllers import controller_fields

from .errors import ConfigError
from .hooks import HOOKS, RolloutHook, hook_numbers


def _check(condition: bool, key: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


@contextmanager
def _section(name: str) -> Iterator[None]:
    """Errors of the library's own checks, with the name of the section in front of the key."""
    try:
        yield
    except EapoError as error:
        raise ConfigError(f"{name}.{error}") from None


@dataclass(frozen=True)
class ModelConfig:
    """The language model that is trained."""

    path: str = "smollm2-135m"
    """A directory in Hugging Face format (a model, or an adapter saved by a run), or the name of an embedded model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; the trained weights themselves always stay in fp32."""
    attention: str = "sdpa"
    """Attention implementation as transformers names it: sdpa, eager, flash_attention_2."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda, or cuda:N."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    cache: str = "~/.cache/eapo_kernels"
    """Where embedded models are kept after their one conversion."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685) through peft."""

    rank: int = 0
    """Rank of the adapters; 0 trains every weight of the model."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers that get adapters; empty means all of them."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear modules that get adapters. The output head cannot be one of them."""

    def __post_init__(self) -> None:
        _check(self.rank >= 0, "lora.rank", "at least 0", self.rank)
        _check(self.alpha > 0, "lora.alpha", "a positive number", self.alpha)


@dataclass(frozen=True)
class DataConfig:
    """Questions to train on and questions to evaluate on."""

    train: str = "trainer/data/medical_definitions/train.jsonl"
    """JSONL or Parquet with the columns prompt (text or chat messages) and answer; all others go to the rewards."""
    eval: str = "trainer/data/medical_definitions/eval.jsonl"
    """Held-out questions in the same format; empty for none."""
    train_limit: int = 0
    """Use only the first so many training questions; 0 means all."""
    eval_limit: int = 0
    """Use only the first so many held-out questions; 0 means all."""
    system_prompt: str = ""
    """Put before every text prompt as the system message; empty leaves that to the chat template."""
    max_prompt_tokens: int = 1024
    """A longer prompt is an error: cutting a question silently changes it."""
    answer_marker: str = "</think>"
    """Text that ends the reasoning: the final answer is what follows it (pear)."""
    teacher_prompt: str = "{prompt}\n\nA correct answer: {answer}\n\n"
    """What the teacher of trace is asked: the policy itself, with the reference answer before its eyes."""

    def __post_init__(self) -> None:
        _check(self.train_limit >= 0, "data.train_limit", "at least 0", self.train_limit)
        _check(self.eval_limit >= 0, "data.eval_limit", "at least 0", self.eval_limit)
        _check(self.max_prompt_tokens > 0, "data.max_prompt_tokens", "at least 1", self.max_prompt_tokens)


@dataclass(frozen=True)
class RolloutConfig:
    """How answers are sampled."""

    engine: Literal["transformers"] = "transformers"
    """The engine that generates."""
    prompts: int = 4
    """Questions a step."""
    responses: int = 8
    """Answers to each question; together they form one group."""
    max_new_tokens: int = 128
    """An answer that has not ended by then is truncated."""
    temperature: float = 1.0
    """Sampling temperature. Log-probs, entropy and loss use the same one."""
    top_p: float = 1.0
    """Nucleus sampling; below 1 the engine's log-probs are those of the cut distribution, so a mismatch is logged."""
    batch: int = 64
    """Most answers generated at once."""

    def __post_init__(self) -> None:
        _check(self.prompts >= 1, "rollout.prompts", "at least 1", self.prompts)
        _check(self.responses >= 2, "rollout.responses", "at least 2 (a group of one has no signal)", self.responses)
        _check(self.max_new_tokens >= 1, "rollout.max_new_tokens", "at least 1", self.max_new_tokens)
        _check(self.temperature > 0, "rollout.temperature", "a positive number", self.temperature)
        _check(0 < self.top_p <= 1, "rollout.top_p", "in (0, 1]", self.top_p)
        _check(self.batch >= 1, "rollout.batch", "at least 1", self.batch)


@dataclass(frozen=True)
class RewardsConfig:
    """What a good answer is. The reward of an answer is the weighted sum over the functions that scored it."""

    functions: tuple[str, ...] = ("similarity",)
    """Built-in names (similarity, rouge, exact_match; without reference answers agreement, majority) or import paths
    module:function with TRL's signature."""
    weights: tuple[float, ...] = (1.0,)
    """One weight for each function."""
    on_failure: Literal["exclude", "stop"] = "exclude"
    """A score that is missing, NaN, infinite or raised: leave that question's group out of the step, or end the run."""
    embedding_model: str = "minilm-l6-v2"
    """Sentence embedding for similarity: an embedded name or a directory in Hugging Face format."""
    embedding_share: float = 0.5
    """Share of the embedding's cosine in similarity; the rest is ROUGE-L, which a fluent wrong answer cannot game."""

    def __post_init__(self) -> None:
        _check(len(self.functions) > 0, "rewards.functions", "at least one function", self.functions)
        _check(len(set(self.functions)) == len(self.functions), "rewards.functions", "no name twice", self.functions)
        expected = f"as many as rewards.functions ({len(self.functions)})"
        _check(len(self.weights) == len(self.functions), "rewards.weights", expected, self.weights)
        _check(0 <= self.embedding_share <= 1, "rewards.embedding_share", "in [0, 1]", self.embedding_share)


@dataclass(frozen=True)
class LossConfig:
    """The objective: a method of eapo_kernels and what to change about it (None keeps the method's own).

    Every other number of the chosen method is a key of this section too: of its weights, its controller, its rollouts and its
    configuration (``lambda_min`` for steer, ``target`` for aepo, ``kl_coef`` for any). docs/methods.md lists the methods.
    """

    method: str = "eapo"
    """A method of eapo_kernels.METHODS: eapo, grpo, dapo, steer, clip_cov, siren, aepo, cure and more (docs/methods.md)."""
    surrogate: str | None = None
    """ppo_clip, unclipped, balanced_clip, cispo, gspo or reinforce."""
    advantage: str | None = None
    """group_norm, group_mean, sign, batch_norm or binary."""
    reduction: str | None = None
    """token_mean, seq_mean_token_mean, seq_mean_token_sum or fixed_length (of rollout.max_new_tokens)."""
    clip_low: float | None = None
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float | None = None
    """The ratio is clipped above at 1 + clip_high."""
    entropy_coef: float | None = None
    """Weight of an entropy bonus (EAPO needs none)."""
    importance_cap: float | None = None
    """Truncated importance sampling: cap of exp(trainer's old log-prob - engine's log-prob)."""
    reference_ema: float | None = None
    """Where the method has a KL penalty: the reference's weights keep this share at every step and take the rest from the
    policy; 1 (the default, but 0.99 for t1) keeps the first policy."""
    numbers: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """What ``settings`` found under other keys of this section."""

    def __post_init__(self) -> None:
        _check(self.method in METHODS, "loss.method", f"one of {', '.join(METHODS)}", self.method)
        ema = self.reference_ema
        _check(ema is None or 0 <= ema <= 1, "loss.reference_ema", "a number in [0, 1]", ema)
        with _section("loss"):
            self.build(fixed_length=1)
            self.hook()

    def build(self, fixed_length: int) -> Method:
        """The method with these changes; ``fixed_length`` is used by the reduction of that name only."""
        own = {name: getattr(self, name) for name in _LOSS_FIELDS if getattr(self, name) is not None}
        numbers = {name: value for name, value in self.numbers.items() if name not in hook_numbers(self.method)}
        weight = controller_fields("entropy_ratio")
        for name in numbers:
            elsewhere = METHODS[self.method].controller == "entropy_ratio" and name in weight
            _check(not elsewhere, f"loss.{name}", f"{name} in the section eapo", self.numbers[name])
        return get_method(self.method, **{"fixed_length": fixed_length, **own, **numbers})

    def hook(self) -> RolloutHook:
        """A fresh rollout hook of the method."""
        own = hook_numbers(self.method)
        return HOOKS.get(self.method, RolloutHook)(**{k: v for k, v in self.numbers.items() if k in own})

    def reference_share(self) -> float:
        """``reference_ema``, or the method's own."""
        return self.reference_ema if self.reference_ema is not None else 0.99 if self.method == "t1" else 1.0


_LOSS_FIELDS = ("surrogate", "advantage", "reduction", "clip_low", "clip_high", "entropy_coef", "importance_cap")


def loss_numbers() -> frozenset[str]:
    """The keys of the section loss that are numbers of some method and not fields of ``LossConfig``."""
    names = {"positive_weight", *(item.name for item in fields(EAPOConfig))}
    for name, method in METHODS.items():
        names.update(hook_numbers(name))
        names.update(item.name for item in (fields(method.shaper) if method.shaper else ()))
        names.update(controller_fields(method.controller) if method.controller else ())
    return frozenset(names - {item.name for item in fields(LossConfig)})


@dataclass(frozen=True)
class EntropyWeightConfig:
    """Weight of the positive answers: clamp(scale * (H / H_0)^kappa, low, high) with H the policy's token entropy."""

    kappa: float = 1.0
    """Exponent of the entropy ratio."""
    scale: float = 1.0
    """Weight at the first step, where the ratio is 1."""
    low: float = 0.0
    """Smallest weight."""
    high: float = float("inf")
    """Largest weight."""
    ema: float = 0.0
    """Smoothing of H over steps: H <- ema * H + (1 - ema) * measured; 0 is none."""

    def __post_init__(self) -> None:
        with _section("eapo"):
            EntropyRatio(**asdict(self))


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and how the step's answers are cut into updates."""

    lr: float = 1e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine ends at a tenth of the peak."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    minibatches: int = 1
    """Optimizer updates a pass over the step's answers; more than one makes the later ones off-policy."""
    epochs: int = 1
    """Passes over the step's answers."""
    micro_batch_tokens: int = 8192
    """Most padded tokens in one forward pass. It decides memory and speed, never the result."""

    def __post_init__(self) -> None:
        _check(self.lr > 0, "optim.lr", "a positive number", self.lr)
        _check(self.max_grad_norm > 0, "optim.max_grad_norm", "a positive number", self.max_grad_norm)
        _check(self.warmup_steps >= 0, "optim.warmup_steps", "at least 0", self.warmup_steps)
        _check(self.minibatches >= 1, "optim.minibatches", "at least 1", self.minibatches)
        _check(self.epochs >= 1, "optim.epochs", "at least 1", self.epochs)
        _check(self.micro_batch_tokens >= 1, "optim.micro_batch_tokens", "at least 1", self.micro_batch_tokens)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation before and after training, with the sampling of ``rollout`` and a seed of its own."""

    responses: int = 4
    """Answers to each question."""
    train_questions: int = 0
    """Also evaluate on the first so many training questions."""
    every: int = 0
    """Also evaluate after every so many steps; 0 only before and after."""
    resamples: int = 2000
    """Bootstrap resamples (of questions) behind the 95 % confidence intervals."""

    def __post_init__(self) -> None:
        _check(self.responses >= 2, "eval.responses", "at least 2 (diversity compares answers)", self.responses)
        _check(self.train_questions >= 0, "eval.train_questions", "at least 0", self.train_questions)
        _check(self.every >= 0, "eval.every", "at least 0", self.every)
        _check(self.resamples >= 1, "eval.resamples", "at least 1", self.resamples)


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str = "run"
    """The run's files go to <out>/<name>."""
    out: str = "runs"
    """Directory of all runs."""
    overwrite: bool = False
    """Replace a finished run of the same name instead of refusing."""
    seed: int = 0
    """Of everything: order of questions, adapters' initial weights, sampling of answers."""
    steps: int = 100
    """Training steps; each samples answers and learns from them."""
    samples_per_step: int = 2
    """Answers of each step that are written to samples.jsonl."""
    diagnose_every: int = 1
    """Steps between measurements of the entropy change that an update was predicted to make and made: one more forward pass
    over the step's answers; 0 for none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eapo: EntropyWeightConfig = field(default_factory=EntropyWeightConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        _check(bool(self.name) and "/" not in self.name, "name", "a directory name", self.name)
        _check(self.steps >= 1, "steps", "at least 1", self.steps)
        _check(self.diagnose_every >= 0, "diagnose_every", "at least 0", self.diagnose_every)
        with _section("rollout"):
            self.loss.hook().responses(self.rollout.responses)
        updates = self.rollout.prompts * self.rollout.responses
        expected = f"at most the {updates} answers of a step"
        _check(self.optim.minibatches <= updates, "optim.minibatches", expected, self.optim.minibatches)

    def method(self) -> Method:
        """The objective with all its numbers."""
        method = self.loss.build(fixed_length=self.rollout.max_new_tokens)
        return replace(method, controller_settings=asdict(self.eapo)) if method.controller == "entropy_ratio" else method
