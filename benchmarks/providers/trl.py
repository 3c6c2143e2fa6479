"""TRL's fused head, as its GRPO trainer gives it to a model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from torch import Tensor, nn

from ..case import Case, Results
from . import Provider, around, needs


class _HeadAlone(nn.Module):
    """What ``add_fused_lm_head`` asks of a causal language model, with given hidden states instead
    of a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.hidden: Tensor
        self.head: SimpleNamespace

    def base_model(self, **kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.head

    def forward(self) -> None:
        raise NotImplementedError("only the fused forward is called")


def prepare(case: Case, mode: str) -> Callable[[], Results]:
    from trl.trainer.utils import add_fused_lm_head

    model, labels = _HeadAlone(), case.targets[None]
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))

    def op(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        model.hidden, model.head = hidden[None], SimpleNamespace(weight=weight, bias=None)
        out = model.forward(fused_lm_head=True, shift_labels=labels)
        return out.log_probs[0], out.entropy[0]

    return around(op, case, mode)


# Importing trl sets vLLM's logging variables and, with old versions of transformers, patches its lazy module; neither is used.
PROVIDERS = [
    Provider(
        "trl_fused_head",
        "log-prob, entropy, policy loss",
        prepare,
        unavailable=needs("trl", "trl.trainer.utils"),
        settings="outputs log_probs and entropy, as its GRPO trainer asks; else defaults",
    )
]
