"""Drop-ins for cross-entropy and for Liger's fused GRPO loss. Runs on a CPU in a second.

.venv/bin/python examples/linear_cross_entropy.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from eapo_kernels.integrations import linear_cross_entropy
from eapo_kernels.integrations.liger import FusedLinearGRPOLoss  # was: from liger_kernel.chunked_loss import Liger...


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 64, 128, requires_grad=True)  # [B, T, D]
    weight = torch.randn(5000, 128, requires_grad=True)  # [V, D]
    targets = torch.randint(0, 5000, (4, 64))

    plain = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten())
    ours = linear_cross_entropy(hidden, weight, targets)
    (d_plain,), (d_ours,) = (torch.autograd.grad(loss, weight, retain_graph=True) for loss in (plain, ours))
    print(
        f"cross-entropy  plain {plain:.5f}  ours {ours:.5f}  gradients differ by at most {(d_plain - d_ours).abs().max():.1e}"
    )

    loss_of = FusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", compiled=False)
    mask, advantages = torch.ones(4, 64), torch.tensor([1.0, 0.5, -0.5, -1.0])
    loss, (clipped,) = loss_of(hidden, weight, targets, mask, advantages, positive_weight=0.8)
    loss.backward()
    print(f"GRPO loss with positives weighted by 0.8: {loss:.5f}, clipped {clipped:.3f}")


if __name__ == "__main__":
    main()
