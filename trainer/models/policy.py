"""The trained language model: loading, adapters, and hidden states without logits."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
from transformers.utils import logging as transformers_logging

from eapo_kernels import EapoError, token_stats
from eapo_kernels.integrations.own_logits import backbone, logit_transform, require_same

from .. import ranks
from ..config import LoraConfig, ModelConfig
from ..errors import CheckpointError, ModelError
from .embedded import base_of_adapter, resolve
from .limits import load_tokenizer, token_rows
from .weights import fill, shard, skeleton, unsharded, write_model

T = TypeVar("T")
RENAMED = "`(is_)?gradient_checkpointing"
"""Start of a warning: transformers 5.23 renames these methods, and peft still uses the old names."""


class Policy(nn.Module):
    """A causal language model (with or without adapters) that returns final hidden states and its
    head instead of logits.

    The head's weight is used inside ``forward``, where FSDP2 has gathered it. Dropout is always
    off, so that old and new log-probs come from the same function.

    Attributes:
        model: the transformers model, or the peft model around it.
        tokenizer: its tokenizer.
        eos_ids: tokens that end a completion: those of the tokenizer and of the generation config.
        head_options: softcap and logit_scale of the output head, learned from the model, as keywords of
            ``eapo_kernels``.
        packed: whether micro-batches shall be packed: one row of sequences without padding.
    """

    model: PreTrainedModel | PeftModel
    language_model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        packing: str = "auto",
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """device: where to move the model, or this rank's shards of it; None leaves it where it is.
        packing: as ``model.packing``. weights: of a model that is a skeleton, on rank 0; nothing on
        the others.
        """
        super().__init__()
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.language_model = model.get_base_model() if isinstance(model, PeftModel) else model
        head = self.language_model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ModelError(f"model: expected a plain linear output head (no adapter on it), got {type(head).__name__}")
        own, known = self.language_model.generation_config.eos_token_id, range(token_rows(self.language_model))
        found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        self.eos_ids: list[int] = sorted(found & {*known})
        if not self.eos_ids:
            expected = f"an end-of-sequence token in the generation config or tokenizer, one of the model's {len(known)}"
            raise ModelError(f"model: expected {expected}, got {sorted(found) or 'none'}")
        # Padding is masked, so any token will do; one that was only added to the tokenizer has no row.
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id in known else self.eos_ids[0]
        self.head_options: dict[str, float | None] = {}
        self.checkpointed = [
            m for m in self.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
        ]
        self.eval()
        if ranks.size() > 1:
            shard(self, self.language_model, dtype, device or self.device)
            if weights is not None:
                fill(model, weights, device or self.device)
                self.language_model.tie_weights(recompute_mapping=False)  # allocated apart
        elif device is not None:
            self.to(device)
        self._check_head()
        self.flash = str(self.language_model.config._attn_implementation).startswith("flash_attention")
        self.packed = (packing == "always" or (packing == "auto" and self.flash)) and self._keeps_apart()
        if packing == "always" and not self.packed:
            kind = type(self.language_model).__name__
            raise ModelError(f"model.packing: expected auto or never with {kind}, which mixes packed sequences, got 'always'")

    @property
    def device(self) -> torch.device:
        return self.language_model.get_output_embeddings().weight.device

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def trained_weights(self) -> dict[str, Tensor]:
        """Name -> trained weight, in the model's own memory."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def precision(self) -> torch.autocast:
        """Autocast to the compute dtype; the trained weights stay in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, rows: Tensor, head: Callable[..., T],
        lengths: Sequence[int] | None = None,
    ) -> T:  # fmt: skip
        """Call ``head(hidden, weight, **head_options)`` on chosen positions and return its result.

        Args:
            input_ids: [b, L] int64.
            attention_mask: [b, L] int64, or None where nothing is padded.
            rows: [N] int64, positions in the flattened [b * L] whose hidden states are used.
            head: receives hidden [N, D] and weight [V, D] in the compute dtype.
            lengths: of the sequences that are packed into the one row; None: a row is a sequence.
        """
        packing = {} if lengths is None else self._packing(lengths)
        with self.precision(), self._recomputing():
            hidden = backbone(self.language_model)(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **packing
            )
        chosen = hidden.last_hidden_state.flatten(0, 1)[rows]
        linear = self.language_model.get_output_embeddings()
        bias = None if linear.bias is None else linear.bias.to(self.dtype)
        return head(chosen.to(self.dtype), linear.weight.to(self.dtype), bias=bias, **self.head_options)

    def main_grad(self) -> Tensor | None:
        """[V, D] fp32: the gradient of the head's weight, to which ``policy_loss`` adds without a
        rounding to the compute dtype; None where the head is frozen.

        For the use in ``head``, where FSDP2 has gathered the weight. FSDP2 reduces this gradient after
        the backward pass, a tied embedding's share included.
        """
        weight = self.language_model.get_output_embeddings().weight
        if weight.requires_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad

    def _packing(self, lengths: Sequence[int]) -> dict[str, Any]:
        """What tells a model where packed sequences begin. From position ids transformers makes a
        mask, or the arguments of flash attention's variable-length kernels, but those again in each
        layer, with a host wait.
        """
        positions = torch.cat([torch.arange(length) for length in lengths])[None].to(self.device, non_blocking=True)
        if not self.flash:
            return {"position_ids": positions}
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(self.device, non_blocking=True)
        longest = max(lengths)
        bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return {"position_ids": positions, **bounds}

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Put checkpointed layers into training mode: transformers recomputes activations only
        there. Their submodules stay in eval mode, without dropout.
        """
        for layer in self.checkpointed:
            layer.training = torch.is_grad_enabled()
        try:
            yield
        finally:
            for layer in self.checkpointed:
                layer.training = False

    @torch.no_grad()
    def _check_head(self) -> None:
        """Learn ``head_options`` from the model, and compare log-probs once with its own logits: heads
        of model families differ in scales and caps.
        """
        vocabulary = self.language_model.config.get_text_config().vocab_size
        ids = torch.arange(1, 6, device=self.device)[None] % vocabulary
        mask, targets = torch.ones_like(ids), ids[0, 1:]
        rows = torch.arange(4, device=self.device)
        try:
            with unsharded(self):
                self.head_options = logit_transform(self.language_model)._asdict()
            ours = self(ids, mask, rows, lambda h, w, **o: token_stats(h, w, targets, entropy="none", **o).logp)
            with self.precision(), unsharded(self):
                logits = self.language_model(input_ids=ids, attention_mask=mask).logits[0, :-1]
            require_same(type(self.language_model).__name__, ours, logits, targets)
        except EapoError as error:
            raise ModelError(f"model: {error}") from error

    @torch.no_grad()
    def _keeps_apart(self) -> bool:
        """Whether the hidden states of a packed sequence are those that it has alone, whatever comes
        before it. Not so for a state that runs along the row, or a model without position ids.
        """
        if "position_ids" not in signature(backbone(self.language_model).forward).parameters:
            return False
        vocabulary = self.language_model.config.get_text_config().vocab_size
        ids = torch.arange(1, 15, device=self.device) % vocabulary
        first, other, second = ids[:5], ids[5:10], ids[10:]
        last = torch.arange(4, device=self.device)

        def hidden(h: Tensor, w: Tensor, **_: Any) -> Tensor:
            return h.float()

        alone = self(second[None], torch.ones_like(second)[None], last, hidden)
        behind = [self(torch.cat([before, second])[None], None, last + 5, hidden, (5, 4)) for before in (first, other)]
        return all(self.same_hidden(found, alone) for found in behind)

    def same_hidden(self, found: Tensor, expected: Tensor) -> bool:
        """Whether hidden states are equal up to the rounding of the compute dtype."""
        error, size = (found - expected).abs().max().item(), expected.abs().max().item()
        return error <= (1e-4 if self.dtype is torch.float32 else 0.05) * size

    def save(self, directory: Path) -> None:
        """Write the adapter (or the full model) and the tokenizer in the format of transformers
        and peft.

        All ranks call it and rank 0 writes, to a temporary directory that is renamed at the end.

        Raises:
            CheckpointError: it cannot be written; an earlier one stays.
        """
        adapted = isinstance(self.model, PeftModel)
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapted)
        weights = get_model_state_dict(self.model, options=whole)  # on rank 0, nothing on the others
        for tied in self.language_model.all_tied_weights_keys:  # gathered twice, written once
            weights.pop(tied, None)
        # Otherwise peft looks up the base model to compare embeddings, which adapters never change here.
        options = {"save_embedding_layers": False} if adapted else {}
        scratch = directory.with_name(f"{directory.name}.tmp")

        def write() -> None:
            shutil.rmtree(scratch, ignore_errors=True)
            try:
                write_model(scratch, self.model, self.tokenizer, state_dict=weights, **options)
                if directory.exists():
                    shutil.rmtree(directory)
                scratch.rename(directory)
            except (OSError, RuntimeError, SafetensorError) as error:
                shutil.rmtree(scratch, ignore_errors=True)
                raise CheckpointError(f"{directory}: expected to write the model, got: {error}") from error

        ranks.run_on_main(write)


def load_policy(config: ModelConfig, lora: LoraConfig, *, seed: int) -> Policy:
    """Load a model, or a saved adapter with its base, and add new adapters when ``lora.rank`` > 0.

    With adapters the frozen weights are kept in ``config.dtype``. Trained weights are always fp32.
    Of several processes the first one reads the files. The others receive the model without its
    weights, then their shards of one tensor after the other.

    Raises:
        ModelError: the model is not found, or this trainer cannot use it.
    """
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", RENAMED, FutureWarning)
    device = find_device(config.device, "model.device")
    whole: PreTrainedModel | PeftModel | None = None

    def load() -> PreTrainedModel | PeftModel:
        nonlocal whole
        whole = load_model(config, lora, seed, device)
        return skeleton(whole) if ranks.size() > 1 else whole

    model = ranks.run_on_main(load)
    tokenizer = load_tokenizer(resolve(config.path, config.cache, weights=False))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = (whole.state_dict() if whole else {}) if ranks.size() > 1 else None
    return Policy(model, tokenizer, getattr(torch, config.dtype), device, config.packing, weights)


def load_model(config: ModelConfig, lora: LoraConfig, seed: int, device: torch.device | None) -> PreTrainedModel | PeftModel:
    """The whole model on the CPU, with its adapters. device: on which it shall run. None is for the meta
    device, as PyTorch's default: without weights, which are not downloaded.

    Raises:
        ModelError: see ``load_policy``.
    """
    warnings.filterwarnings("ignore", RENAMED, FutureWarning)
    directory = resolve(config.path, config.cache, weights=device is not None)  # converts or downloads it, once
    adapted = base_of_adapter(directory, config.cache, weights=device is not None)
    base = adapted or directory
    if adapted and lora.rank:
        raise ModelError(f"lora.rank: expected 0 (the adapter in {directory} is trained on), got {lora.rank}")
    dtype = getattr(torch, config.dtype) if adapted or lora.rank else torch.float32
    try:
        if device is None:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        else:
            chosen = attention(config, device, base)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation=chosen)
    except (ImportError, ValueError, OSError) as error:
        raise ModelError(f"model: expected a causal language model in {base}, got: {error}") from error
    if adapted and device is None:
        settings = PeftConfig.from_pretrained(directory)
        settings.inference_mode, settings.base_model_name_or_path = False, str(base)
        return get_peft_model(model, settings)
    if adapted:
        return PeftModel.from_pretrained(model, directory, is_trainable=True)
    if lora.rank:
        model = with_adapters(model, lora, seed)
        name = str(base.resolve()) if Path(config.path).expanduser().is_dir() else config.path
        model.peft_config["default"].base_model_name_or_path = name
    return model


def with_adapters(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    peft_config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        layers_to_transform=list(lora.layers) or None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, peft_config)
        except ValueError as error:
            raise ModelError(f"lora: expected modules of {type(model).__name__}, got: {error}") from error


def attention(config: ModelConfig, device: torch.device, base: Path) -> str | None:
    """The implementation that ``model.attention`` names; auto is flash attention where it can run, 3
    on Hopper, else None: transformers chooses. base: the directory of the model.

    transformers checks the packages' versions, because flash-attn-4 installs an empty module of the
    same name as flash-attn-2. What a model supports is known to its class, so one is made without
    memory for its weights.
    """
    if config.attention != "auto":
        return config.attention
    if device.type != "cuda" or config.dtype != "bfloat16":
        return None
    hopper = is_flash_attn_3_available() and torch.cuda.get_device_capability(device)[0] == 9
    flash = "flash_attention_3" if hopper else "flash_attention_2" if is_flash_attn_2_available() else None
    if flash:
        own = AutoConfig.from_pretrained(base)
        try:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16, attn_implementation=flash)
        except ValueError as error:
            print(f"model.attention auto: sdpa or eager, because {str(error).split('. ')[0]}", flush=True)
            return None
    return flash


def find_device(name: str, key: str) -> torch.device:
    """The device that the setting ``key`` names; auto is cuda where available, else cpu."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name) or (name != "cpu" and not cuda):
        raise ModelError(f"{key}: expected auto, cpu or cuda[:N] of this machine, got {name!r}{'' if cuda else ' and no CUDA'}")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
