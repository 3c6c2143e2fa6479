"""Rollouts with vLLM inside the trainer's process, with a copy of the weights that is updated after
every step. Under torchrun every process has an engine on its own GPU.

The copy is never read from disk. The engine starts with random weights of the right shapes, and the
first synchronisation fills them in the same way as every later one, whether the policy is new,
resumed or has adapters. It uses vLLM's own reload, which takes weights under the names of a
checkpoint; adapters are merged first, shards gathered tensor by tensor.

Under torchrun vLLM runs with its "external launcher": it adds its groups to the process group of the
trainer. Without tensor parallelism these groups have one member, and the engines are independent.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from importlib import import_module
from typing import Any

import torch

from .. import ranks
from ..config import RolloutConfig
from ..errors import ConfigError, Interrupted, ModelError
from ..learning.measure import measure
from ..models.policy import Policy
from ..models.weights import checkpoint_weights
from ..records import Rollouts, Sampling, Support, Tick, derive_seed
from ..runs.checkpoint import random_state, restore_random_state
from .engines import sample_shares

OLDEST = (0, 32)
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process, so tensors are passed directly
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # shares the cores with the trainer
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""vLLM's own variables, set where the user has not; the first one always."""


class VllmEngine:
    """Samples with vLLM. Log-probs are those of the sampled distribution, after temperature, top-k,
    top-p and min-p; what these left are vLLM's sampling masks (``return_sampling_mask``).

    Every request has a seed from the step and the number of the completion, so a completion does
    not depend on its batch, as far as the engine's arithmetic allows.

    Args:
        policy: on the device on which the engine shall run.
        longest: most tokens of prompt and completion together, unless
            ``rollout.vllm.max_model_len`` is set.

    Raises:
        ConfigError: vLLM is missing, too old or built for another device, the processes do not
            divide into groups of ``rollout.vllm.tensor_parallel_size``, or it has no sampling masks
            and ``rollout.record_support`` needs them.
        ModelError: this vLLM cannot run the model, or its log-probs differ.
    """

    def __init__(self, policy: Policy, rollout: RolloutConfig, longest: int) -> None:
        self.policy, self.own, self.together = policy, rollout.vllm, rollout.vllm.tensor_parallel_size
        if ranks.size() % self.together:
            key = "rollout.vllm.tensor_parallel_size"
            raise ConfigError(f"{key}: expected a divisor of the number of processes, {ranks.size()}, got {self.together}")
        vllm = _import_vllm(policy.device)
        self._params, self._final = vllm.SamplingParams, vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        cpu = policy.device.type == "cpu"
        self.sleep_level = 0 if cpu else self.own.sleep_level
        self._asleep: list[str] = []
        self.masks = rollout.sampling(rollout.responses, seed=0).support
        text = policy.language_model.config.get_text_config()
        self.vocabulary, limit = text.vocab_size, getattr(text, "max_position_embeddings", None) or longest
        gib = self.own.kv_cache_gib or (1.0 if cpu else 0.0)
        self.dtype = policy.dtype if self.own.dtype == "auto" else getattr(torch, self.own.dtype)
        generators = random_state()  # vLLM seeds them all
        with tempfile.TemporaryDirectory(prefix="vllm-") as directory:  # only the configuration is read
            config = copy.deepcopy(policy.language_model.config)
            config.architectures = [type(policy.language_model).__name__]
            config.save_pretrained(directory)
            try:
                self.llm = vllm.LLM(
                    model=directory,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    dtype=str(self.dtype).removeprefix("torch."),
                    max_model_len=self.own.max_model_len or min(longest, limit),
                    max_num_seqs=self.own.max_num_seqs or None,
                    tensor_parallel_size=self.together,
                    distributed_executor_backend="external_launcher" if ranks.size() > 1 else None,
                    gpu_memory_utilization=self.own.gpu_memory_utilization,
                    kv_cache_memory_bytes=int(gib * 2**30) or None,
                    enforce_eager=cpu or self.own.enforce_eager,
                    enable_sleep_mode=self.sleep_level > 0,
                    logprobs_mode="processed_logprobs",
                    return_sampling_mask=self.masks,
                )
            except (ValueError, NotImplementedError) as error:
                said = re.search(r"Value error, (.*?)(?: \[type=|$)", str(error))  # of pydantic, whose last line is a link
                reason = said[1] if said else str(error).strip().splitlines()[-1]
                if reason.startswith("sampling distribution replay"):
                    want = "a vLLM that returns the tokens left by top_p, top_k and min_p (on a GPU it does; otherwise"
                    instead = "rollout.engine transformers, or record_support False and a biased loss)"
                    raise ConfigError(f"rollout.record_support: expected {want} {instead}, got: {reason}") from error
                raise ModelError(f"rollout.engine: expected a model and settings that vLLM accepts, got: {reason}") from error
        restore_random_state(generators)
        try:
            self._load()
            self._check()
            self._sleep()
        except ModelError:
            self.close()
            raise

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, tick: Tick) -> Rollouts:
        room, longest = self.llm.model_config.max_model_len, max(map(len, prompts))
        if longest >= room:
            key = "rollout.vllm.max_model_len, or the model's own limit"
            raise ModelError(f"{key}: expected room for a completion to {longest} tokens, got {room} in all")
        if self._wake("weights") and self.sleep_level == 2:
            self._load()
        self._wake("kv_cache")
        try:
            return self._share(prompts, sampling, tick)
        finally:
            self._sleep()

    def sync_weights(self, policy: Policy) -> None:
        self.policy = policy
        self._wake("weights")
        self._load()

    def close(self) -> None:
        """vLLM's shutdown also destroys the process group, of which a process has only one. One
        process needs that for its next engine; several need the group to the end of the job.
        """
        shutdown = self.llm.llm_engine.engine_core.shutdown
        shutdown() if ranks.size() == 1 else ranks.at_end(shutdown)

    def _load(self) -> None:
        """Copy the policy's present weights and drop caches computed with earlier ones."""
        weights = checkpoint_weights(self.policy.language_model)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights, "is_checkpoint_format": True})
        if self.policy.device.type == "cpu":
            self.llm.apply_model(_repack_heads)
        if not self.llm.reset_prefix_cache():
            raise ModelError("rollout.engine: expected an idle engine at the change of weights, got requests under way")

    def _wake(self, tag: str) -> bool:
        """Returns whether it was asleep."""
        if tag not in self._asleep:
            return False
        torch.cuda.empty_cache()  # so that the engine can allocate it
        self.llm.wake_up(tags=[tag])
        self._asleep.remove(tag)
        return True

    def _sleep(self) -> None:
        if self.sleep_level:
            self.llm.sleep(level=self.sleep_level)
            self._asleep = ["weights", "kv_cache"]

    def _share(self, prompts: Sequence[list[int]], sampling: Sampling, tick: Tick) -> Rollouts:
        return sample_shares(prompts, sampling, partial(self._sample, sampling=sampling, tick=tick), self.together)

    def _sample(self, prompts: list[list[int]], numbers: range, *, sampling: Sampling, tick: Tick) -> Rollouts:
        """The completions ``numbers``, one for each of ``prompts``."""
        params = [
            self._params(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or (self.vocabulary if self.masks else 0),  # masks need a limit
                min_p=sampling.min_p,
                seed=derive_seed(sampling.seed, number),
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=self.policy.eos_ids,
                ignore_eos=True,  # only the policy's eos_ids end a completion
                logprobs=0,  # of the sampled token alone
                detokenize=False,
                output_kind=self._final,
            )
            for number in numbers
        ]
        core, found = self.llm.llm_engine, dict[str, Any]()
        names = [str(number) for number in numbers]
        try:
            for name, prompt, own in zip(names, prompts, params, strict=True):
                core.add_request(name, {"prompt_token_ids": prompt}, own)
            while core.has_unfinished_requests():
                found |= {out.request_id: out.outputs[0] for out in core.step() if out.finished}
                with suppress(Interrupted) if self.together > 1 else nullcontext():  # such ranks finish together
                    tick(len(found), len(prompts))
        finally:  # an interrupted call must not leave requests behind
            core.abort_request([name for name in names if name not in found])
        result = Rollouts(prompts, [], [], [], [] if sampling.support else None)
        for name in names:
            ids = list(found[name].token_ids)
            logp = [entry[token].logprob for token, entry in zip(ids, found[name].logprobs, strict=True)]
            result.completion_ids.append(ids)
            result.logp.append(torch.tensor(logp, dtype=torch.float32))
            result.truncated.append(ids[-1] not in self.policy.eos_ids)
            if result.support is not None:
                result.support.append(_support(found[name].sampling_mask, len(ids)))
        return result

    def _check(self) -> None:
        """Compare log-probs once with the policy's: vLLM leaves weights random, without an error,
        when their names do not match.
        """
        prompt = [i % self.vocabulary for i in range(1, 6)]
        sampling, tick = Sampling(4 * ranks.size() // self.together, 8, 1.0, 1.0, seed=0), lambda *_: None
        rollouts = self._share([prompt], sampling, tick)
        old = measure(self.policy, rollouts, temperature=1.0, budget=64, tick=tick).logp.cpu()
        apart = (old - torch.cat(rollouts.logp)).abs().split([len(ids) for ids in rollouts.completion_ids])
        gap = max(torch.cat(apart[i : i + 4]).mean().item() for i in range(0, len(apart), 4))  # the worst engine's
        exact = self.dtype is torch.float32 and self.policy.dtype is torch.float32
        kind, bound = type(self.policy.language_model).__name__, 1e-3 if exact else 0.1
        if not gap < bound:
            own = f"vLLM's log-probs of {kind} within {bound} of the trainer's"
            raise ModelError(f"rollout.engine: expected {own}, got {gap:.2g} apart")


def _support(mask: Any, length: int) -> Support:
    """The support from vLLM's ``SamplingMask`` of a completion of ``length`` tokens."""
    kept = [] if mask is None else mask.token_ids
    if len(kept) != length:
        raise ModelError(f"rollout.record_support: expected vLLM's sampling masks of {length} tokens, got {len(kept)}")
    ids = [token for tokens in kept for token in sorted(tokens)]
    return Support(torch.tensor(ids, dtype=torch.int32), torch.tensor([len(tokens) for tokens in kept], dtype=torch.int32))


def _repack_heads(model: Any) -> None:
    """Repack output heads. On a CPU vLLM multiplies with packed copies of the weights, and a tied
    head, which is loaded as the embedding, would keep its old copy.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _import_vllm(device: torch.device) -> Any:
    """The vLLM module, after checks of what it would otherwise fail on later.

    Raises:
        ConfigError: see ``VllmEngine``.
    """
    if ranks.size() == 1 and device.type == "cuda" and device.index not in (None, 0):
        raise ConfigError(f"model.device: expected cuda or cuda:0 with vllm (choose with CUDA_VISIBLE_DEVICES), got {device}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    how = "pip install '.[train,vllm]'; on a CPU requirements-vllm.txt says how"
    try:
        vllm = import_module("vllm")
        platform = import_module("vllm.platforms").current_platform
    except ImportError as error:
        raise ConfigError(f"rollout.engine: expected an importable vllm ({how}), got: {error}") from error
    if tuple(vllm.__version_tuple__[:2]) < OLDEST:
        raise ConfigError(f"rollout.engine: expected vllm {OLDEST[0]}.{OLDEST[1]} or newer ({how}), got {vllm.__version__}")
    kind = "cpu" if platform.is_cpu() else "cuda" if platform.is_cuda() else platform.device_name
    if kind != device.type:
        raise ConfigError(f"model.device: expected {kind}, which this vllm was built for, got {device.type}")
    return vllm
