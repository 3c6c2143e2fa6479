"""Recipes and overrides: precedence, round trip, and errors of one line with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.commands import DEMO
from trainer.config import Config
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
    (["--rewards.weights", "1", "2"], "rewards.weights: expected as many as rewards.functions (1)", "got (1.0, 2.0)"),
    (["--name", "../x"], "name: expected the name of a directory in out", "'../x'"),
    (["--overwrite"], "overwrite: expected a value", "got nothing"),
    (["--overwrite", "perhaps"], "overwrite: expected a valid boolean", "got 'perhaps'"),
    (["--name", "a", "b"], "name: expected a valid string", "got ['a', 'b']"),
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
        ("[optim]\nlearning_rate = 1.0", "optim.learning_rate: expected at optim one of lr, "),
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


def test_help_of_eval_names_its_options_and_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--checkpoint" in shown
    assert "--optim.lr" in shown
    assert main(["eval", "--run"]) == 2
    assert "argument --run: expected one argument" in capsys.readouterr().err


def test_commands_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "trainer", "print-config", "--steps", "5"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "steps = 5" in done.stdout


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
    assert not {"torch", "numpy", "transformers", "datasets", "eapo_kernels", "rich"} & set(modules.split())
