"""The choice of the engine, errors before vLLM starts, and the order of sleep, wake-up and weight
updates.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import WORDS, no_tick
from transformers import set_seed

from trainer import ranks
from trainer.config import Config, RolloutConfig, VllmConfig
from trainer.errors import ConfigError, ModelError
from trainer.models.policy import Policy
from trainer.records import Sampling
from trainer.rollouts import vllm_engine
from trainer.rollouts.engines import make_engine, share
from trainer.rollouts.transformers_engine import TransformersEngine
from trainer.rollouts.vllm_engine import VllmEngine


class FakeLLM:
    """Records calls; completes every request with the token 1 at once, drawn from the tokens ``left``."""

    left: list[list[int]] | None = None

    def __init__(self, **options: Any) -> None:
        self.options, self.calls, self.waiting = options, list[str](), list[str]()
        self.asked: Any = None
        self.llm_engine, self.model_config = self, SimpleNamespace(max_model_len=64)

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert kwargs["is_checkpoint_format"]
        assert len(list(kwargs["weights_iterator"])) > 10
        self.calls.append(method)

    def apply_model(self, function: Any) -> None:
        self.calls.append(function.__name__)

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return True

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        self.waiting.append(name)
        self.asked = params

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        self.calls.append("step")
        done, self.waiting = self.waiting, []
        mask = None if self.left is None else SimpleNamespace(token_ids=self.left)
        answer = SimpleNamespace(token_ids=[1], logprobs=[{1: SimpleNamespace(logprob=-0.5)}], sampling_mask=mask)
        return [SimpleNamespace(request_id=name, finished=True, outputs=[answer]) for name in done]

    @property
    def engine_core(self) -> Any:
        return SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))

    def abort_request(self, names: list[str]) -> None:
        assert names == []


def fake_vllm(**changes: Any) -> dict[str, Any]:
    platform = SimpleNamespace(is_cpu=lambda: True, is_cuda=lambda: False, device_name="cpu")
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
    own = {"LLM": FakeLLM, "SamplingParams": SimpleNamespace, "sampling_params": kinds}
    vllm = SimpleNamespace(**{**own, "__version__": "0.32.0", "__version_tuple__": (0, 32, 0), **changes})
    return {"vllm": vllm, "vllm.platforms": SimpleNamespace(current_platform=platform)}


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any]) -> None:
    for name in vllm_engine.ENVIRONMENT:
        monkeypatch.setenv(name, "kept")  # restored after the test
    monkeypatch.setattr(vllm_engine, "import_module", lambda name: modules[name])


def vllm_config(changed: Callable[..., Config]) -> Config:
    return changed(rollout={"engine": "vllm"})


def test_the_default_is_transformers(config: Config, policy: Policy) -> None:
    assert isinstance(make_engine(config, policy), TransformersEngine)


def test_a_missing_vllm_is_one_line_that_says_how_to_install_it(
    changed: Callable[..., Config], policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, {})

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(vllm_engine, "import_module", missing)
    expected = r"rollout\.engine: expected an importable vllm \(pip install '\.\[train,vllm\]'; .*got: No module named 'vllm'$"
    with pytest.raises(ConfigError, match=expected) as error:
        make_engine(vllm_config(changed), policy)
    assert "\n" not in str(error.value)


def test_what_is_refused(changed: Callable[..., Config], policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_vllm(__version__="0.31.1", __version_tuple__=(0, 31, 1)))
    with pytest.raises(ConfigError, match=r"expected vllm 0\.32 or newer .*, got 0\.31\.1"):
        make_engine(vllm_config(changed), policy)
    install(monkeypatch, fake_vllm())
    with pytest.raises(ConfigError, match=r"model\.device: expected cpu, which this vllm was built for, got cuda"):
        vllm_engine._import_vllm(torch.device("cuda:0"))
    with pytest.raises(ConfigError, match=r"model\.device: expected cuda or cuda:0 with vllm .*, got cuda:1"):
        vllm_engine._import_vllm(torch.device("cuda:1"))
    key = r"rollout\.vllm\.tensor_parallel_size"
    with pytest.raises(ConfigError, match=rf"^{key}: expected a divisor of the number of processes, 1, got 2$"):
        VllmEngine(policy, RolloutConfig(vllm=VllmConfig(tensor_parallel_size=2)), 64)


def test_several_processes_have_an_engine_each(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU of the rank, and with the trainer's process group to the end of the job."""
    cuda = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
    install(monkeypatch, {**fake_vllm(), "vllm.platforms": SimpleNamespace(current_platform=cuda)})
    monkeypatch.setattr(ranks, "size", lambda: 4)
    vllm_engine._import_vllm(torch.device("cuda:1"))
    install(monkeypatch, fake_vllm())
    monkeypatch.setattr(VllmEngine, "_check", lambda self: None)
    engine = VllmEngine(policy, RolloutConfig(vllm=VllmConfig(tensor_parallel_size=2)), 64)
    assert engine.llm.options["distributed_executor_backend"] == "external_launcher"
    assert engine.llm.options["tensor_parallel_size"] == 2
    ended: list[Callable[[], None]] = []
    monkeypatch.setattr(ranks, "at_end", ended.append)
    engine.close()
    assert "shutdown" not in engine.llm.calls
    ended[0]()
    assert engine.llm.calls[-1] == "shutdown"


def test_the_engine_leaves_the_global_generators_alone(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM seeds them with the same number in every run and process; rewards may draw from them."""

    class Seeds(FakeLLM):
        def __init__(self, **options: Any) -> None:
            set_seed(0)
            super().__init__(**options)

    def draws() -> list[float]:
        return [random.random(), np.random.random(), torch.rand(()).item()]

    install(monkeypatch, fake_vllm(LLM=Seeds))
    monkeypatch.setattr(VllmEngine, "_check", lambda self: None)
    set_seed(7)
    expected = draws()
    set_seed(7)
    VllmEngine(policy, RolloutConfig(), 64)
    assert draws() == expected


@pytest.mark.parametrize(("batch", "own", "wanted"), [(64, 0, None), (4, 512, 512)])
def test_vllm_chooses_its_batch_unless_it_is_set(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, batch: int, own: int, wanted: int | None
) -> None:
    """``rollout.batch`` is of the engine transformers."""
    install(monkeypatch, fake_vllm())
    monkeypatch.setattr(VllmEngine, "_check", lambda self: None)
    engine = VllmEngine(policy, RolloutConfig(batch=batch, vllm=VllmConfig(max_num_seqs=own)), 64)
    assert engine.llm.options["max_num_seqs"] == wanted
    assert engine.llm.options["distributed_executor_backend"] is None


@pytest.mark.parametrize(
    ("size", "together", "wanted"),
    [
        (1, 1, [range(6)]),
        (4, 1, [range(1), range(1, 3), range(3, 4), range(4, 6)]),
        (4, 2, [range(3), range(3), range(3, 6), range(3, 6)]),
        (8, 1, [range(0), *(range(i, j) for i, j in [(0, 1), (1, 2), (2, 3), (3, 3), (3, 4), (4, 5), (5, 6)])]),
    ],
)
def test_ranks_share_completions(monkeypatch: pytest.MonkeyPatch, size: int, together: int, wanted: list[range]) -> None:
    """Every completion is sampled once."""
    monkeypatch.setattr(ranks, "size", lambda: size)
    found = []
    for rank in range(size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        found.append(share(6, together))
    assert found == wanted
    assert [number for own in found[::together] for number in own] == list(range(6))


def start(policy: Policy, monkeypatch: pytest.MonkeyPatch, level: int) -> tuple[VllmEngine, FakeLLM]:
    """An engine on a fake vLLM that reports the memory of a GPU."""
    install(monkeypatch, fake_vllm())
    monkeypatch.setattr(VllmEngine, "_check", lambda self: None)
    engine = VllmEngine(policy, RolloutConfig(vllm=VllmConfig(sleep_level=level)), 64)  # type: ignore[arg-type]
    llm: FakeLLM = engine.llm
    assert llm.calls == ["reload_weights", "_repack_heads", "reset_prefix_cache"], "a CPU never sleeps"
    assert llm.options["enforce_eager"]
    assert not llm.options["enable_sleep_mode"]
    monkeypatch.setattr(engine, "sleep_level", level)
    engine._sleep()
    llm.calls.clear()
    return engine, llm


SAMPLING = Sampling(2, 4, 1.0, 1.0, seed=0)


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_around_updates(policy: Policy, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    engine, llm = start(policy, monkeypatch, level)
    load = ["reload_weights", "_repack_heads", "reset_prefix_cache"]
    engine.generate([[5]], SAMPLING, no_tick)
    again = load if level == 2 else []  # level 2 threw the weights away
    assert llm.calls == ["wake weights", *again, "wake kv_cache", "step", f"sleep {level}"]
    llm.calls.clear()
    engine.sync_weights(policy)
    assert llm.calls == ["wake weights", *load], "the KV cache's memory is still the trainer's"
    llm.calls.clear()
    engine.sync_weights(policy)
    rollouts = engine.generate([[5], [6]], SAMPLING, no_tick)
    assert llm.calls == [*load, "wake kv_cache", "step", f"sleep {level}"]
    assert rollouts.prompt_ids == [[5], [5], [6], [6]]
    assert rollouts.truncated == [False] * 4


def test_an_engine_that_fails_its_check_is_closed(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_vllm())
    made: list[FakeLLM] = []
    step = FakeLLM.step

    def noted(self: FakeLLM) -> list[Any]:
        made.append(self)
        return step(self)

    monkeypatch.setattr(FakeLLM, "step", noted)
    with pytest.raises(ModelError, match=r"within 0\.001 of the trainer's, got"):  # whatever is asked, it says -0.5
        VllmEngine(policy, RolloutConfig(), 64)
    assert made[0].calls[-1] == "shutdown"


def test_level_0_stays_awake(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, llm = start(policy, monkeypatch, 0)
    engine.generate([[5]], SAMPLING, no_tick)
    assert llm.calls == ["step"]


def test_weights_do_not_change_under_running_requests(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, llm = start(policy, monkeypatch, 0)
    monkeypatch.setattr(llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(ModelError, match="expected an idle engine at the change of weights"):
        engine.sync_weights(policy)


def with_filter(
    monkeypatch: pytest.MonkeyPatch, policy: Policy, modules: dict[str, Any], **rollout: Any
) -> tuple[VllmEngine, Any]:
    install(monkeypatch, modules)
    monkeypatch.setattr(VllmEngine, "_check", lambda self: None)
    engine = VllmEngine(policy, RolloutConfig(**rollout), 64)
    return engine, engine.llm


def test_vllm_returns_what_the_filters_left(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RolloutConfig(top_p=0.9, min_p=0.1)
    engine, llm = with_filter(monkeypatch, policy, fake_vllm(), top_p=0.9, min_p=0.1)
    assert llm.options["return_sampling_mask"]
    assert llm.options["logprobs_mode"] == "processed_logprobs"
    monkeypatch.setattr(FakeLLM, "left", [[1, 7, 4]])
    rollouts = engine.generate([[5], [6]], config.sampling(1, seed=0), no_tick)
    assert (llm.asked.top_p, llm.asked.min_p) == (0.9, 0.1)
    assert llm.asked.top_k == len(WORDS), "masks need a limit, and this one removes nothing"
    assert rollouts.support is not None
    assert [(own.ids.tolist(), own.counts.tolist()) for own in rollouts.support] == [([1, 4, 7], [3])] * 2
    engine.generate([[5]], replace(config.sampling(1, seed=0), top_k=3), no_tick)
    assert llm.asked.top_k == 3
    assert engine.generate([[5]], SAMPLING, no_tick).support is None, "nothing is removed"
    for left in (None, [[1], [1]]):
        monkeypatch.setattr(FakeLLM, "left", left)
        with pytest.raises(ModelError, match=r"expected vLLM's sampling masks of 1 tokens, got [02]$"):
            engine.generate([[5]], config.sampling(1, seed=0), no_tick)


def test_a_vllm_without_sampling_masks_is_refused_unless_a_biased_loss_is_wanted(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = r"^rollout\.record_support: expected a vLLM that returns the tokens left by .*record_support False"

    class V1(FakeLLM):
        def __init__(self, **options: Any) -> None:
            if options.get("return_sampling_mask"):
                said = "Value error, sampling distribution replay requires Model Runner V2 [type=value_error, input_type=Args]"
                raise ValueError(f"1 validation error for VllmConfig\n  {said}\n    For further information visit https://x")
            super().__init__(**options)

    with pytest.raises(ConfigError, match=rf"{needed}.*, got: sampling distribution replay requires Model Runner V2$") as error:
        with_filter(monkeypatch, policy, fake_vllm(LLM=V1), top_k=5)
    assert "\n" not in str(error.value)
    engine, llm = with_filter(monkeypatch, policy, fake_vllm(LLM=V1), top_k=5, record_support=False)
    sampling = RolloutConfig(top_k=5, record_support=False).sampling(1, seed=0)
    assert engine.generate([[5]], sampling, no_tick).support is None
    assert llm.asked.top_k == 5
    assert not llm.options["return_sampling_mask"]
