"""``METHODS``: all methods by name; their settings and controllers.

Methods without a TokenWeighting are listed here, the others at the ends of the files of
``token_weights``.
"""

from __future__ import annotations

from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from ..errors import require
from .config import EAPOConfig
from .controllers import Controller, build_controller, controller_fields
from .token_weights import covariance, entropy, entropy_change, other_policy, probability, sequence
from .token_weights.step import Method

__all__ = ["METHODS", "Method", "get_method", "make_controller"]

_BINARY = EAPOConfig(advantage="binary", split="advantage")

_GRPO = Method("grpo", EAPOConfig(reduction="seq_mean_token_mean"), source="2402.03300",
    summary="Group-normalised advantages, clipped ratio, every response counts the same.",
    formula="A_i = (r_i - mean r) / std r; mean over responses of the mean over tokens of min(rho A, clip(rho) A)")  # fmt: skip
_DAPO = Method("dapo", EAPOConfig(clip_high=0.28), source="2503.14476",
    summary="A looser upper bound, and every token counts the same; the trainer draws other questions for groups that "
            "are all right or all wrong.",
    formula="min(rho A, clip(rho, 0.8, 1.28) A), mean over all tokens")  # fmt: skip

_CONFIGURED = (
    Method("eapo", EAPOConfig(), positive_weight=None, controller="entropy_ratio", source="2605.27846",
        confidence="medium",
        summary="Positives (reward above the group mean) weighted by current over initial policy entropy.",
        formula="w_i = lambda_k = clamp(lambda_0 (H_k / H_0)^kappa, low, high) where r_i > mean r of the group, else 1"),
    _GRPO,
    replace(_GRPO, name="empo", source="2504.05812",
        summary="The same data as `grpo`, without labels: the rewards are those of `semantic_rewards`.",
        formula="r_i = |cluster of i| / G, 0 where all answers of the group differ; then GRPO"),
    Method("dr_grpo", EAPOConfig(advantage="group_mean", reduction="fixed_length"), source="2503.20783",
        summary="No division by the group's spread, constant length (set fixed_length): no difficulty or length bias.",
        formula="A_i = r_i - mean r; sum over tokens / fixed_length"),
    _DAPO,
    replace(_DAPO, name="cure", source="2508.11016",
        summary="The same data as `dapo`, on responses some of which the trainer cut at an uncertain token and rewrote."),
    Method("gspo", replace(_GRPO.config, surrogate="gspo", clip_low=3e-4, clip_high=4e-4), source="2507.18071",
        summary="One ratio for a whole response, the geometric mean over its tokens, with narrow bounds to match.",
        formula="rho_i = exp(mean_t log(pi / pi_old)); min(rho_i A_i, clip(rho_i, 1 - 3e-4, 1 + 4e-4) A_i)"),
    Method("cispo", EAPOConfig(surrogate="cispo", clip_low=1.0, clip_high=4.0),
        source="2506.13585; upper bound 5 as in 2510.13786",
        summary="The importance weight is bounded from above and constant, so that no token loses its gradient.",
        formula="sg(min(rho, 5)) A log p"),
    Method("psr", replace(_BINARY, negative_weight=0.0, drop_zero_weight=True), source="2506.01347",
        summary="Positive sample reinforcement: only correct responses (reward 1), advantage +1.",
        formula="A = 1 where r = 1; the other responses are left out"),
    Method("nsr", replace(_BINARY, drop_zero_weight=True), positive_weight=0.0, source="2506.01347",
        summary="Negative sample reinforcement: only wrong responses (reward 0), advantage -1.",
        formula="A = -1 where r = 0; the other responses are left out"),
    Method("w_reinforce", _BINARY, positive_weight=0.1, source="2506.01347",
        summary="Weighted REINFORCE: correct responses +0.1, wrong ones -1.",
        formula="A = 0.1 where r = 1, -1 where r = 0"),
    Method("t1", replace(_GRPO.config, entropy_coef=1e-3, kl_coef=1e-3), source="2501.11651", confidence="low",
        summary="Entropy bonus and a KL to a reference that follows the policy; the trainer updates ``ref_logp`` and "
                "oversamples, the coefficients are ours.",
        formula="grpo + 1e-3 KL(pi || pi_ref) - 1e-3 H"),
)  # fmt: skip

_FILES = (entropy, entropy_change, covariance, probability, sequence, other_policy)

METHODS: MappingProxyType[str, Method] = MappingProxyType(
    {m.name: m for methods in (_CONFIGURED, *(file.METHODS for file in _FILES)) for m in methods}
)


def get_method(method: str | Method, **changes: Any) -> Method:
    """A method, given by its name or itself, with some settings changed.

    ``changes``: fields of its config, of its token weighting or of its controller, or
    ``positive_weight``.

    Raises:
        EapoError: the name or a setting's name is unknown, or a value is out of range.
    """
    if isinstance(method, str):
        require(method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(method))
        method = METHODS[method]
    require(isinstance(method, Method), "method", "a name or a Method", method)
    if not changes:
        return method
    weighting = method.token_weighting
    owners = {
        "method": ("positive_weight",),
        "token_weighting": () if weighting is None else tuple(f.name for f in fields(weighting)),
        "controller": () if method.controller is None else controller_fields(method.controller),
        "config": tuple(f.name for f in fields(EAPOConfig)),
    }
    known = [name for names in owners.values() for name in names]
    unknown = sorted(set(changes) - set(known))
    require(not unknown, "config", f"fields among {', '.join(known)}", ", ".join(unknown))
    of = {owner: {name: changes[name] for name in names if name in changes} for owner, names in owners.items()}
    method = replace(
        method,
        config=replace(method.config, **of["config"]),
        token_weighting=None if weighting is None else replace(weighting, **of["token_weighting"]),
        controller_settings={**method.controller_settings, **of["controller"]},
        **of["method"],
    )
    if of["controller"]:
        make_controller(method)  # checks the settings
    return method


def make_controller(method: Method) -> Controller | None:
    """A new controller with the method's settings; None for a method without one.

    Raises:
        EapoError: the controller or a setting is unknown, or a number is out of its range.
    """
    require(isinstance(method, Method), "method", "a Method, such as get_method(name)", repr(method))
    return None if method.controller is None else build_controller(method.controller, method.controller_settings)
