"""All settings of a run. ``settings.parse_config`` fills them from a TOML recipe and from flags.

Only the check of a method's own numbers imports the library, and torch with it.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from ..errors import ConfigError, check
from .section import Count, Decay, Natural, NonNegative, Positive, PositiveShare, Section, Share, literal, unknown

if TYPE_CHECKING:
    from eapo_kernels import Method

    from ..records import Sampling


class ModelConfig(Section):
    """The language model that is trained."""

    path: str = "smollm2-135m"
    """A folder in Hugging Face format (a model, or an adapter that a run saved), a hub id, or an embedded model's name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; the trained weights themselves always stay in fp32."""
    attention: str = "auto"
    """sdpa, eager, flash_attention_2 or flash_attention_3. auto is flash attention where its package is installed, dtype is
    bfloat16 and the model's class supports it (3 on Hopper), else transformers' choice."""
    packing: Literal["auto", "always", "never"] = "auto"
    """A micro-batch is one row of sequences without padding (always, and auto with flash attention), or padded rows."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda, or cuda:N."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    cache: str = "~/.cache/eapo_kernels"
    """Directory of converted embedded models."""


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685) through peft."""

    rank: Natural = 0
    """Rank of the adapters; 0 trains every weight of the model."""
    alpha: Positive = 32.0
    """The adapters' output is scaled by alpha / rank."""
    layers: tuple[Natural, ...] = ()
    """Numbers of the layers that get adapters; empty means all of them."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear modules that get adapters. The output head cannot be one of them."""


class ColumnsConfig(Section):
    """Names of the columns in the data. A dot leads into a nested one: reward_model.ground_truth."""

    prompt: str = "prompt"
    """Text, or chat messages with role and content."""
    answer: str = "answer"
    """The reference answer; empty where the data have none."""


class DataConfig(Section):
    """Training prompts and held-out prompts. All columns go to the rewards."""

    train: str = ""
    """A JSONL, JSON, CSV or Parquet file, a folder of them, or a hub dataset as ID, ID:SPLIT or ID:CONFIG:SPLIT."""
    eval: str = ""
    """Held-out prompts, in the same way; empty for none."""
    train_limit: Natural = 0
    """Use only the first N training prompts; 0 means all."""
    eval_limit: Natural = 0
    """Use only the first N held-out prompts; 0 means all."""
    columns: ColumnsConfig = ColumnsConfig()
    answer_after: str = ""
    """The reference answer is what follows the last occurrence of this text in its column: "####" for GSM8K."""
    prompt_template: str = "{prompt}"
    """Text of every prompt, in which {prompt} is the column's (of messages the last one's)."""
    system_prompt: str = ""
    """System message before every text prompt; empty keeps the chat template's default."""
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(default={})
    """Keywords of the chat template: enable_thinking = false for Qwen3."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are left out, and counted in one line: truncation would silently change them."""
    answer_marker: str = "</think>"
    """Text that ends the reasoning: the final answer is what follows it (pear)."""
    teacher_prompt: str = "{prompt}\n\nA correct answer: {answer}\n\n"
    """The prompt, with the reference answer, from which trace computes its teacher log-probs."""


class VllmConfig(Section):
    """The engine ``vllm``: one in every process, on the device of the trained model, with its own copy of the weights."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the engine's weights and computation; auto is model.dtype. Another one calls for loss.importance_cap."""
    gpu_memory_utilization: PositiveShare = 0.4
    """Share of the GPU's memory for the engine's weights and KV cache; the trainer uses the rest."""
    kv_cache_gib: NonNegative = 0.0
    """Memory of the KV cache; 0 is what gpu_memory_utilization leaves, on a CPU 1 GiB."""
    max_num_seqs: Natural = 0
    """Most completions computed at once by one engine; 0 is vLLM's own default (256, on an H100 1024)."""
    tensor_parallel_size: Count = 1
    """Consecutive processes of torchrun that hold one copy of the engine's weights together and sample the same completions."""
    max_model_len: Natural = 0
    """Longest prompt and completion together; 0 is what the settings allow, or the model's limit if that is smaller."""
    enforce_eager: bool = False
    """Disable compilation and CUDA graphs: faster start, slower generation. Always set on a CPU."""
    sleep_level: Annotated[int, Field(ge=0, le=2)] = 2
    """What the engine frees between rollouts on a GPU: 0 nothing, 1 the KV cache and the weights by moving them to host
    memory, 2 both without a copy on the host."""


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """transformers generates with the trained module itself; vllm has a copy of its weights, updated after every step."""
    prompts: Count = 4
    """Prompts in a step."""
    responses: Annotated[int, Field(ge=2)] = 8
    """Completions of each prompt, at least 2; together they form one group."""
    max_new_tokens: Count = 128
    """A completion without an end-of-sequence token within this length is truncated."""
    temperature: Positive = 1.0
    """Sampling temperature. Log-probs, entropy and loss use the same one."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling: the fewest tokens whose probabilities add up to this; 1 is no limit."""
    top_k: Natural = 0
    """Sample from the k most probable tokens; 0 is no limit."""
    min_p: Decay = 0.0
    """Sample from the tokens with at least this share of the largest probability; 0 is no limit."""
    record_support: bool = True
    """Log-probs, entropy and loss are those of the sampled distribution, over the tokens that top_p, top_k and min_p left;
    False: those of the whole vocabulary."""
    resample_rounds: Natural | None = None
    """Most additional draws of other prompts to replace groups whose rewards are all equal (DAPO's dynamic sampling,
    arXiv:2503.14476). None: 2 for the method dapo, 0 for others."""
    batch: Count = 64
    """Most completions generated at once."""
    vllm: VllmConfig = VllmConfig()

    def sampling(self, responses: int, seed: int) -> Sampling:
        """These settings with a number of responses and a seed."""
        from ..records import Sampling

        return Sampling(
            responses, self.max_new_tokens, self.temperature, self.top_p, seed, self.top_k, self.min_p, self.record_support
        )


class JudgeConfig(Section):
    """The reward ``judge``: a language model behind an OpenAI-compatible endpoint scores every completion."""

    url: Annotated[str, Field(pattern=r"^https?://[^/:]")] = "http://localhost:8000/v1"
    """Requests go to <url>/chat/completions; the default is the address of ``vllm serve MODEL`` on this machine."""
    model: str = ""
    """The model's name as the endpoint knows it."""
    api_key_env: str = ""
    """Environment variable that holds the API key; empty sends the word none."""
    template: Annotated[str, Field(pattern=r"\{completion\}")] = (
        "Grade an answer to a question against a reference answer.\n\nQuestion:\n{prompt}\n\nReference answer:\n{answer}\n\n"
        "Answer to grade:\n{completion}\n\nJudge only whether its content is correct and complete, not its length or style. "
        'Give one short reason, then end with a line "Score: N", where N is a number from 0 (wrong or empty) to 10 (as good as '
        "the reference)."
    )
    """Message to the judge, with {prompt}, {answer} (the reference) and {completion}. It must ask for "Score: N" from 0 to 10;
    the last one in the reply counts."""
    max_tokens: Count = 256
    """Most tokens of the judge's reply."""
    retries: Natural = 4
    """Retries by the openai client after status 408, 409, 429 or 5xx, a lost connection, or silence for
    timeout / (retries + 1)."""


class RewardModelConfig(Section):
    """The reward ``reward_model``: the output of a sequence classifier with one output."""

    path: str = ""
    """A folder in Hugging Face format for AutoModelForSequenceClassification, or an id of the hub."""
    batch: Count = 16
    """Most completions in one forward pass."""
    max_tokens: Count = 4096
    """Most tokens of prompt and completion together. A longer completion is a failure."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and computation."""


BUILT_IN_REWARDS = ("similarity", "rouge", "exact_match", "math_verify", "reward_model", "judge")


class RewardsConfig(Section):
    """How completions are scored. The reward is the weighted sum over the functions that scored the completion."""

    functions: Annotated[tuple[str, ...], Field(min_length=1)] = ("similarity",)
    """similarity, rouge, exact_match, math_verify, reward_model, judge, or module:function with TRL's signature."""
    weights: tuple[float, ...] = (1.0,)
    """One weight for each function."""
    on_failure: Literal["exclude", "stop"] = "exclude"
    """What a missing, NaN, infinite or failed score does: exclude the group of that prompt from the step, or stop the run."""
    overlong: Literal["keep", "mask", "penalty"] = "keep"
    """Truncated completions are trained on like the others, or left out of the loss; or rewards fall linearly by up to 1 over
    the last overlong_window tokens (DAPO, arXiv:2503.14476, eq. 13)."""
    overlong_window: Natural = 0
    """Tokens before rollout.max_new_tokens over which the penalty grows; 0 is a fifth of them, as in DAPO."""
    concurrency: Count = 16
    """Most concurrent calls of one async function, the judge too; a call covers all completions of one prompt."""
    timeout: Positive = 300.0
    """Seconds for one call of an async function, with the judge's retries. Ordinary functions have no time limit."""
    embedding_model: str = "minilm-l6-v2"
    """Sentence embedding for similarity: an embedded name, a folder in Hugging Face format or an id of the hub."""
    embedding_share: Share = 0.5
    """Share of the embedding cosine in similarity; the rest is ROUGE-L, which a fluent wrong completion does not raise."""
    judge: JudgeConfig = JudgeConfig()
    reward_model: RewardModelConfig = RewardModelConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.functions:
            check(
                name in BUILT_IN_REWARDS or ":" in name, "functions", f"{', '.join(BUILT_IN_REWARDS)} or module:function", name
            )
        check(len(set(self.functions)) == len(self.functions), "functions", "no name twice", self.functions)
        expected = f"as many as rewards.functions ({len(self.functions)})"
        check(len(self.weights) == len(self.functions), "weights", expected, self.weights)
        if "judge" in self.functions:
            check(bool(self.judge.model), "judge.model", "the model's name at the endpoint", self.judge.model)
        if "reward_model" in self.functions:
            check(bool(self.reward_model.path), "reward_model.path", "a directory", self.reward_model.path)
        return self


class LossConfig(Section):
    """The objective: a method of eapo_kernels, and changes to it (None keeps the method's own value).

    Every other number of the chosen method is a key of this section too: those of its token weights, its controller and
    its configuration (``lambda_min`` for steer, ``target`` for aepo, ``kl_coef`` for any). docs/methods.md
    lists the methods.
    """

    model_config = ConfigDict(extra="allow")

    method: str = "eapo"
    """A method of eapo_kernels.METHODS: eapo, grpo, dapo, steer, clip_cov, siren, aepo, cure and more (docs/methods.md)."""
    surrogate: str | None = None
    """ppo_clip, unclipped, balanced_clip, cispo, gspo or reinforce."""
    advantage: str | None = None
    """group_norm, group_mean, sign, batch_norm or binary."""
    reduction: str | None = None
    """token_mean, seq_mean_token_mean, seq_mean_token_sum or fixed_length (of rollout.max_new_tokens)."""
    clip_low: Share | None = None
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegative | None = None
    """The ratio is clipped above at 1 + clip_high."""
    entropy_coef: float | None = None
    """Weight of an entropy bonus (EAPO needs none)."""
    importance_cap: Positive | None = None
    """Truncated importance sampling: cap of exp(trainer's old log-prob - engine's log-prob)."""
    reference_ema: Share | None = None
    """After every step the reference of a KL penalty is ema * reference + (1 - ema) * policy. None: 0.99 for t1, else 1."""
    gradient_tolerance: Annotated[float, Field(gt=0, le=0.5)] | None = None
    """Leave the smallest probabilities out of the gradient: each token's error is at most this share of it (docs/sparse.md).
    0.002 is about the rounding of bf16. None: exact."""

    @model_validator(mode="before")
    @classmethod
    def _numbers_of_text(cls, table: Any) -> Any:
        """The method's own numbers have no type here."""
        if not isinstance(table, dict):
            return table
        return {name: value if name in cls.model_fields else literal(value) for name, value in table.items()}

    @property
    def numbers(self) -> dict[str, Any]:
        """The method's own numbers that were set."""
        return self.model_extra or {}

    def check(self) -> None:
        """Raise ConfigError for an unknown method, or a number that it does not have or refuses."""
        from eapo_kernels import METHODS, EAPOConfig, EapoError
        from eapo_kernels.objectives.controllers import controller_fields

        check(self.method in METHODS, "loss.method", f"one of {', '.join(METHODS)}", self.method)
        method = METHODS[self.method]
        weight = controller_fields(method.controller) if method.controller else ()
        known = [*LossConfig.model_fields, "positive_weight", *weight, *(field.name for field in fields(EAPOConfig))]
        known += [field.name for field in fields(method.token_weighting)] if method.token_weighting else []
        for name in self.numbers:
            in_eapo = method.controller == "entropy_ratio" and name in weight
            check(not in_eapo, f"loss.{name}", f"{name} in the section eapo", self.numbers[name])
            if name not in known:
                raise ConfigError(unknown(["loss", name], list(dict.fromkeys(known))))
        try:
            self.build(fixed_length=1)
        except EapoError as error:
            raise ConfigError(f"loss.{error}") from None

    def build(self, fixed_length: int) -> Method:
        """The method with these changes. ``fixed_length`` is used by the reduction of that name
        only.
        """
        from eapo_kernels import get_method

        own = self.model_dump(exclude={"method", "reference_ema", "gradient_tolerance"})
        given = {name: value for name, value in own.items() if value is not None or name in self.numbers}
        return get_method(self.method, **{"fixed_length": fixed_length, **given})

    def reference_share(self) -> float:
        """``reference_ema``, or the method's default."""
        return self.reference_ema if self.reference_ema is not None else 0.99 if self.method == "t1" else 1.0


class EntropyWeightConfig(Section):
    """Weight of the positive completions: clamp(scale * (H / H_0)^kappa, low, high) with H the policy's token entropy.

    The defaults keep the noise of the step's questions out of the weight (docs/training.md). The paper's weight is ema 0,
    low 0, high inf, anchor_steps 1.
    """

    kappa: float = 1.0
    """Exponent of the entropy ratio."""
    scale: NonNegative = 1.0
    """Weight in the anchor steps, where the ratio is 1."""
    low: NonNegative = 0.2
    """Smallest weight."""
    high: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 5.0
    """Largest weight."""
    ema: Decay = 0.9
    """Smoothing of H over steps: H <- ema * H + (1 - ema) * measured; 0 is none."""
    anchor_steps: Count = 10
    """H_0 is the mean of H over this number of first steps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check(self.low <= self.high, "low", f"at most high ({self.high:g})", self.low)
        return self


class OptimConfig(Section):
    """AdamW, and how a step's completions are split into updates."""

    lr: Positive = 1e-6
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw keeps its moments in fp32, 8 bytes a trained weight; adamw_8bit (torchao) in 8-bit numbers with a scale for each
    block of 256, 2.03 bytes."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this global norm."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine ends at a tenth of the peak."""
    warmup_steps: Natural = 0
    """Steps of linear warm-up."""
    minibatches: Count = 1
    """Optimizer updates in one pass over the completions of a step; with more than one the later updates are off-policy."""
    epochs: Count = 1
    """Passes over the step's completions."""
    old_logp: Literal["auto", "always"] = "auto"
    """Whether a forward pass over all completions measures the old log-probs and H: always, or not where it would change
    nothing but rounding (docs/training.md)."""
    micro_batch_tokens: Count = 8192
    """Most tokens, padding included, in one forward pass. It determines memory and speed, not the result."""


class EvalConfig(Section):
    """Evaluation before and after training, with the sampling of ``rollout`` and a separate seed."""

    responses: Annotated[int, Field(ge=2)] = 4
    """Completions to each prompt, at least 2: diversity compares them."""
    greedy: bool = False
    """One completion to each prompt, of the most probable tokens, in the place of ``responses`` samples."""
    train_prompts: Natural = 0
    """Also evaluate on the first N training prompts."""
    first: bool = True
    """Evaluate before the first step, too."""
    every: Natural = 0
    """Also evaluate after every N steps; 0 evaluates only before and after training."""


class LogConfig(Section):
    """Output, and trackers beside the run's own files (``metrics.jsonl`` is always written)."""

    heartbeat: NonNegative = 60.0
    """Without a terminal, seconds of silence after which a line says what a step is doing; 0 for never."""
    tensorboard: bool = False
    """Write TensorBoard's event files to <run>/tensorboard (pip install '.[track]')."""
    wandb: bool = False
    """Log to Weights & Biases (pip install '.[track]'); WANDB_MODE=offline keeps it on this machine."""
    wandb_project: Annotated[str, Field(min_length=1)] = "eapo"
    """The project there."""


class CheckpointConfig(Section):
    """Checkpoints in <out>/<name>/checkpoints, from which a run resumes exactly."""

    every: Natural = 50
    """Steps between checkpoints; a last one is written at the end and on interruption. 0 writes none."""
    keep: Count = 2
    """Number of latest checkpoints that are kept."""


class Config(Section):
    """One run."""

    name: str = "run"
    """The run's files go to <out>/<name>."""
    out: str = "runs"
    """Directory of all runs."""
    overwrite: bool = False
    """Replace a run of the same name instead of raising an error."""
    resume: Literal["", "auto"] = ""
    """auto: from the run's latest valid checkpoint, or a new run where there is none."""
    seed: Natural = 0
    """Seed of everything: order of prompts, initial adapter weights, sampling of completions."""
    steps: Count = 100
    """Training steps; each samples completions and updates on them."""
    samples_per_step: Natural = 2
    """Completions of each step written to samples.jsonl: the best, the worst, the second best, and so on."""
    diagnose_every: Natural = 0
    """Steps between measurements of predicted and actual entropy change of an update (one more forward pass); 0 for none."""
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
        """What several settings must satisfy together."""
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
