"""Recipes and overrides: precedence, round trip, and errors of one line with exit code 2."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tiny import PAPER

from eapo_kernels import make_controller
from trainer.__main__ import main
from trainer.commands import DEMO
from trainer.config import Config, EntropyWeightConfig
from trainer.config.settings import parse_config, to_toml
from trainer.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_overrides_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    text = "steps = 7\n[optim]\nlr = 1e-3\nbetas = [0.8, 0.9]\n[lora]\nlayers = [1, 2]\n[eapo]\nhigh = inf\n"
    flags = "--optim.lr 5e-4 --rewards.functions rouge exact_match --rewards.weights 0.3 0.7 --loss.clip-high 0.3"
    config = parse_config(["--config", str(write(tmp_path, text)), *flags.split()])
    assert (config.steps, config.optim.lr, config.optim.betas, config.lora.layers) == (7, 5e-4, (0.8, 0.9), (1, 2))
    assert config.rewards.functions == ("rouge", "exact_match")
    assert config.loss.build(8).config.clip_high == 0.3
    assert config.loss.build(8).config.clip_low == 0.2
    assert config.rollout == Config().rollout


def test_toml_round_trip(tmp_path: Path) -> None:
    flags = ["--name", 'a "b"', "--overwrite", "True", "--data.system-prompt=--so\nto = say", "--lora.layers", "3"]
    config = parse_config([*flags, "--loss.importance-cap", "2", "--data.eval", ""])
    assert config.data.system_prompt == "--so\nto = say"
    assert parse_config([], recipe=write(tmp_path, to_toml(config))) == config
    assert parse_config([], recipe=write(tmp_path, to_toml(Config()))) == Config()


def test_demo_recipe_is_valid() -> None:
    assert parse_config([], recipe=DEMO).steps >= 12


WRONG_FLAGS = [
    (["--optim.lrr", "1"], "optim.lrr: expected at optim one of", "got 'lrr' (did you mean 'lr'?)"),
    (["--optim.lr", "abc"], "optim.lr: expected a valid number", "got 'abc'"),
    (["--optim.lr", "-1"], "optim.lr: expected a number greater than 0", "got '-1'"),
    (["--steps", "0"], "steps: expected a number greater than or equal to 1", "got '0'"),
    (["--steps", "2.5"], "steps: expected a valid integer", "got '2.5'"),
    (["--rollout.responses", "1"], "rollout.responses: expected a number greater than or equal to 2", "got '1'"),
    (["--rollout.engine", "magic"], "rollout.engine: expected 'transformers' or 'vllm'", "got 'magic'"),
    (["--rollout.top-k", "-1"], "rollout.top_k: expected a number greater than or equal to 0", "got '-1'"),
    (["--rollout.min-p", "1"], "rollout.min_p: expected a number less than 1", "got '1'"),
    (["--loss.method", "siren", "--rollout.top-k", "9"], "rollout.record_support: expected False with siren", "got True"),
    (["--loss.method", "reinforce++"], "loss.method: expected one of eapo", "got 'reinforce++'"),
    (["--loss.clip_low", "2"], "loss.clip_low: expected a number less than or equal to 1", "got '2'"),
    (["--loss.advantage", "foo"], "loss.advantage: expected one of", "'foo'"),
    (["--eapo.ema", "1"], "eapo.ema: expected a number less than 1", "got '1'"),
    (
        ["--rewards.functions", "nonsense"],
        "rewards.functions: expected similarity, ",
        "judge or module:function, got 'nonsense'",
    ),
    (["--rewards.judge.template", "Grade it."], "rewards.judge.template: expected text that matches", "got 'Grade it.'"),
    (["--rewards.weights", "1", "2"], "rewards.weights: expected as many as rewards.functions (1)", "got (1.0, 2.0)"),
    (["--name", "../x"], "name: expected the name of a directory in out", "got '../x'"),
    (["--overwrite"], "overwrite: expected a value", "got nothing"),
    (["--overwrite", "perhaps"], "overwrite: expected a valid boolean", "got 'perhaps'"),
    (["--name", "a", "b"], "name: expected a valid string", "got ['a', 'b']"),
    (["--data.answer-after", "\udcff"], "data.answer_after: expected text that UTF-8 can hold", r"got '\udcff'"),
    (
        ["--rewards.functions", "a:b", "\udcff"],
        "rewards.functions: expected text that UTF-8 can hold",
        r"got ['a:b', '\udcff']",
    ),
    (["--optim", "3"], "optim: expected a table", "got '3'"),
    (["--steps", "3", "--steps.a", "1"], "steps.a: expected steps to be a table", "got '3'"),
    (["stray"], "expected --section.key value", "got 'stray'"),
    (["--steps=3", "4"], "expected --section.key value", "got '4'"),
    (["--config"], "expected the path of a TOML recipe", "got nothing"),
    (["--config", "no/such.toml"], "expected a readable TOML recipe", "no/such.toml"),
]


@pytest.mark.parametrize(
    ("arguments", "expected", "got"), WRONG_FLAGS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_wrong_flags_are_one_line(arguments: list[str], expected: str, got: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert got in captured.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stepps = 3", "stepps: expected at the top level one of"),
        ("[optim]\nlearning_rate = 1.0", "optim.learning_rate: expected at optim one of "),
        ("optim = 3", "optim: expected a table, got 3"),
        ("[steps]\na = 1", "steps: expected a valid integer, got {'a': 1}"),
        ('steps = "many"', "steps: expected a valid integer, got 'many'"),
        ("steps = true", "steps: expected a number or text, got True"),
        ("steps = ", "expected TOML, got"),
        ("[rollout]\ntemperature = 0", "rollout.temperature: expected a number greater than 0, got 0"),
    ],
)  # fmt: skip
def test_wrong_recipes_are_one_line_with_the_file(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        parse_config([], recipe=path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    assert expected in str(error.value)


# The numbers that every setting takes, as an interval; of a pair or list, those of each element.
NUMBERS = """
seed = "[0, inf)"
steps = "[1, inf)"
samples_per_step = "[0, inf)"
diagnose_every = "[0, inf)"
lora = { rank = "[0, inf)", alpha = "(0, inf)", layers = "[0, inf)" }
data = { train_limit = "[0, inf)", eval_limit = "[0, inf)", max_prompt_tokens = "[1, inf)" }
eval = { responses = "[2, inf)", train_prompts = "[0, inf)", every = "[0, inf)" }
log = { heartbeat = "[0, inf)" }
checkpoint = { every = "[0, inf)", keep = "[1, inf)" }

[rollout]
prompts = "[1, inf)"
responses = "[2, inf)"
max_new_tokens = "[1, inf)"
temperature = "(0, inf)"
top_p = "(0, 1]"
resample_rounds = "[0, inf)"
top_k = "[0, inf)"
min_p = "[0, 1)"
batch = "[1, inf)"
vllm.gpu_memory_utilization = "(0, 1]"
vllm.kv_cache_gib = "[0, inf)"
vllm.sleep_level = "[0, 2]"
vllm.max_model_len = "[0, inf)"
vllm.max_num_seqs = "[0, inf)"
vllm.tensor_parallel_size = "[1, inf)"

[rewards]
weights = "(-inf, inf)"
overlong_window = "[0, inf)"
concurrency = "[1, inf)"
timeout = "(0, inf)"
embedding_share = "[0, 1]"
judge.max_tokens = "[1, inf)"
judge.retries = "[0, inf)"
reward_model = { batch = "[1, inf)", max_tokens = "[1, inf)" }

[eapo]
kappa = "(-inf, inf)"
scale = "[0, inf)"
low = "[0, 5]"
high = "[0.2, inf]"
ema = "[0, 1)"
anchor_steps = "[1, inf)"

[loss]
clip_low = "[0, 1]"
clip_high = "[0, inf)"
entropy_coef = "(-inf, inf)"
importance_cap = "(0, inf)"
reference_ema = "[0, 1]"
gradient_tolerance = "(0, 0.5]"

[optim]
lr = "(0, inf)"
betas = "[0, 1)"
weight_decay = "[0, inf)"
max_grad_norm = "(0, inf)"
warmup_steps = "[0, inf)"
minibatches = "[1, 32]"
epochs = "[1, inf)"
micro_batch_tokens = "[1, inf)"
"""


def leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


def numeric(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every numeric setting and its type as text."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from numeric(kind, f"{prefix}{name}.")
        elif not any(other in str(kind) for other in ("Literal", "dict")) and ("int" in str(kind) or "float" in str(kind)):
            yield prefix + name, str(kind)


KINDS, INTERVALS = dict(numeric(Config)), dict(leaves(tomllib.loads(NUMBERS)))


def test_the_table_of_numbers_has_every_numeric_setting() -> None:
    assert KINDS.keys() == INTERVALS.keys()


def _accepts(key: str, values: list[str]) -> bool:
    try:
        parse_config([f"--{key}", *values])
    except ConfigError as error:
        message = str(error)
    else:
        return True
    assert message.startswith((f"command line: {key}: expected ", "command line: eapo.low: expected at most high"))
    assert "\n" not in message
    return False


@pytest.mark.parametrize(("key", "interval"), INTERVALS.items(), ids=str)
def test_every_number_is_checked_at_and_beyond_its_bounds(key: str, interval: str) -> None:
    low, high = map(float, interval[1:-1].split(", "))
    integer = "float" not in KINDS[key]
    step = 1 if integer else 1e-9

    def accepts(value: float) -> bool:
        text = f"{value:.0f}" if integer and math.isfinite(value) else repr(value)
        return all(_accepts(key, values) for values in ([[text, "0.5"], ["0.5", text]] if key == "optim.betas" else [[text]]))

    assert not accepts(math.nan)
    assert not accepts(-math.inf)
    assert accepts(math.inf) == (interval[-2:] == "f]")
    for bound, closed, inside in ((low, interval[0] == "[", low + step), (high, interval[-1] == "]", high - step)):
        if math.isfinite(bound):
            assert accepts(bound) == closed
            assert accepts(inside)
            assert not accepts(2 * bound - inside)
    if math.isinf(low):
        assert accepts(-1e6)
    if math.isinf(high):
        assert accepts(1_000_000)


def weights(config: EntropyWeightConfig, entropies: list[float]) -> list[float]:
    controller = make_controller(Config(eapo=config).method())
    assert controller
    return [float(controller.update(entropy, 1)) for entropy in entropies]


def deviation(values: list[float]) -> float:
    return math.sqrt(sum((value - 1) ** 2 for value in values) / len(values))


def test_the_default_weight_ignores_the_noise_of_the_questions() -> None:
    """Entropies of an unchanged policy on 8 fresh questions a step, as measured: 2.51 nats with a
    deviation of 0.61 between questions.
    """
    rng = random.Random(0)
    runs = [[sum(rng.gauss(2.51, 0.61) for _ in range(8)) / 8 for _ in range(60)] for _ in range(60)]
    default = [weight for run in runs for weight in weights(EntropyWeightConfig(), run)[-40:]]
    paper = [weight for run in runs for weight in weights(PAPER, run)[-40:]]
    assert 0.10 < deviation(paper) < 0.16
    assert deviation(default) < 0.04
    assert max(abs(weight - 1) for weight in default) < 0.12


def test_the_default_weight_follows_the_entropy_within_its_bounds() -> None:
    falling = [2.5] * 10 + [2.5 * (1 - 0.01 * k) for k in range(1, 51)]
    default = weights(EntropyWeightConfig(), falling)
    assert default[:10] == [1.0] * 10
    assert default[-1] == pytest.approx(0.5, abs=0.1)  # nine steps behind
    assert weights(EntropyWeightConfig(), falling + [1.25] * 30)[-1] == pytest.approx(0.5, abs=0.01)
    assert weights(EntropyWeightConfig(), [2.5] * 10 + [1e-3] * 99)[-1] == 0.2
    assert weights(EntropyWeightConfig(), [0.1] * 10 + [9.0] * 99)[-1] == 5.0
    assert weights(PAPER, [2.0, 1.0, 6.0, 0.1]) == pytest.approx([1.0, 0.5, 3.0, 0.05])


@pytest.mark.parametrize("arguments", [["fly"], ["report", "/nowhere"], ["train"], ["train", "--data.train", "/nowhere.jsonl"]])
def test_other_wrong_input_is_one_line_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_documents_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key, sentence in (
        ("--optim.lr", "Peak learning rate"),
        ("--eapo.kappa", "Exponent"),
        ("--lora.rank", "0 trains every"),
    ):
        assert key in text
        assert sentence in text


def test_a_reader_may_leave() -> None:
    """``train --help | head -1`` says nothing on stderr."""
    command = f"{sys.executable} -m trainer train --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_help_of_eval_names_its_options_and_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--run RUN" in shown
    assert "--optim.lr" in shown
    assert main(["eval", "--run"]) == 2
    assert "argument --run: expected one argument" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="Linux with huge pages")
@pytest.mark.parametrize("chosen", ["0", None])
def test_large_tensors_begin_on_pages_of_their_own(chosen: str | None) -> None:
    """So that they leave no holes in the heap; the user's own choice stays."""
    code = """
from trainer.__main__ import main
main(["print-config"])
import torch
print({torch.empty(1 << 22).data_ptr() % 4096 for _ in range(4)} == {0})
"""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"THP_MEM_ALLOC_ENABLE": chosen} if chosen else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == str(chosen is None)


def test_commands_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "trainer", "print-config", "--steps", "5"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "steps = 5" in done.stdout


HEAVY = {"torch", "numpy", "transformers", "datasets", "eapo_kernels", "rich"}


@pytest.mark.parametrize("arguments", [["--help"], ["--optim.betas", "0.9", "1.5"], ["--optim.lrr", "1"]], ids=" ".join)
def test_help_and_bad_settings_wait_for_no_heavy_import(arguments: list[str]) -> None:
    code = (
        "import sys; from trainer.__main__ import main\n"
        "try: print(main(['train', *sys.argv[1:]]))\n"
        "except SystemExit as stop: print(stop.code)\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    *_, status, modules = done.stdout.splitlines()
    assert status == ("0" if arguments == ["--help"] else "2")
    assert "trainer.config.settings" in modules.split()
    assert not HEAVY & set(modules.split())


def test_a_bad_setting_of_a_runs_evaluation_waits_for_no_heavy_import(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("steps = 3\n")
    (tmp_path / "model").mkdir()
    code = "import sys; from trainer.__main__ import main; print(main(sys.argv[1:])); print(*sys.modules)"
    arguments = ["eval", "--run", str(tmp_path), "--optim.lrr", "1"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    status, modules = done.stdout.splitlines()
    assert status == "2"
    assert "optim.lrr: expected at optim one of" in done.stderr
    assert not HEAVY & set(modules.split())
