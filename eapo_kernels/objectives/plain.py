"""Methods that are a configuration alone: nothing weighs their tokens but the advantage and the surrogate."""

from __future__ import annotations

from dataclasses import replace

from .config import EAPOConfig
from .method import Method

_GRPO = EAPOConfig(reduction="seq_mean_token_mean")
_DAPO = EAPOConfig(clip_high=0.28)
_BINARY = EAPOConfig(advantage="binary", split="advantage")

METHODS = (
    Method(
        "eapo",
        EAPOConfig(),
        positive_weight=None,
        controller="entropy_ratio",
        source="2605.27846",
        summary="Positives (reward above the group mean) weighted by current over initial policy entropy.",
        formula="w_i = lambda_k = clamp(lambda_0 (H_k / H_0)^kappa, low, high) where r_i > mean r of the group, else 1",
        confidence="medium",
    ),
    Method(
        "grpo",
        _GRPO,
        source="2402.03300",
        summary="Group-normalised advantages, clipped ratio, every response counts the same.",
        formula="A_i = (r_i - mean r) / std r; mean over responses of the mean over tokens of min(rho A, clip(rho) A)",
    ),
    Method(
        "dr_grpo",
        EAPOConfig(advantage="group_mean", reduction="fixed_length"),
        source="2503.20783",
        summary="No division by the group's spread, constant length (set fixed_length): no difficulty or length bias.",
        formula="A_i = r_i - mean r; sum over tokens / fixed_length",
    ),
    Method(
        "dapo",
        _DAPO,
        source="2503.14476",
        summary="A looser upper bound, and every token counts the same; drawing other questions for groups that are all "
        "right or all wrong is the trainer's.",
        formula="min(rho A, clip(rho, 0.8, 1.28) A), mean over all tokens",
    ),
    Method(
        "gspo",
        replace(_GRPO, surrogate="gspo", clip_low=3e-4, clip_high=4e-4),
        source="2507.18071",
        summary="One ratio for a whole response, the geometric mean over its tokens, with bounds that are narrow to match.",
        formula="rho_i = exp(mean_t log(pi / pi_old)); min(rho_i A_i, clip(rho_i, 1 - 3e-4, 1 + 4e-4) A_i)",
    ),
    Method(
        "cispo",
        EAPOConfig(surrogate="cispo", clip_low=1.0, clip_high=4.0),
        source="2506.13585; upper bound 5 as in 2510.13786",
        summary="The importance weight is bounded from above and constant, so that no token loses its gradient.",
        formula="sg(min(rho, 5)) A log p",
    ),
    Method(
        "psr",
        replace(_BINARY, negative_weight=0.0, drop_zero_weight=True),
        source="2506.01347",
        summary="Positive sample reinforcement: only correct responses (reward 1), advantage +1.",
        formula="A = 1 where r = 1; the other responses are left out",
    ),
    Method(
        "nsr",
        replace(_BINARY, drop_zero_weight=True),
        positive_weight=0.0,
        source="2506.01347",
        summary="Negative sample reinforcement: only wrong responses (reward 0), advantage -1.",
        formula="A = -1 where r = 0; the other responses are left out",
    ),
    Method(
        "w_reinforce",
        _BINARY,
        positive_weight=0.1,
        source="2506.01347",
        summary="Weighted REINFORCE: correct responses +0.1, wrong ones -1.",
        formula="A = 0.1 where r = 1, -1 where r = 0",
    ),
    Method(
        "empo",
        _GRPO,
        source="2504.05812",
        summary="No labels: the reward of an answer is the share of its group that means the same (``semantic_rewards``).",
        formula="r_i = |cluster of i| / G, 0 where all answers of the group differ; then GRPO",
    ),
    Method(
        "cure",
        _DAPO,
        source="2508.11016",
        summary="DAPO on responses some of which were cut at an uncertain token and rewritten; the cutting is the trainer's.",
        formula="as dapo",
    ),
    Method(
        "t1",
        replace(_GRPO, entropy_coef=1e-3, kl_coef=1e-3),
        source="2501.11651",
        summary="Entropy bonus and a KL to a reference that follows the policy; moving ``ref_logp`` along and oversampling "
        "are the trainer's, the coefficients ours.",
        formula="grpo + 1e-3 KL(pi || pi_ref) - 1e-3 H",
        confidence="low",
    ),
)
