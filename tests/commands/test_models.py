"""Which provider is asked for which model; the two always match."""

from __future__ import annotations

import json
import tomllib

import pytest
from support.daemon import Folders, command
from support.station import Station

from imagewatch.config.example import example
from imagewatch.sandbox import DEFAULT_MODELS

FAMILIES = {
    "gpt-image-2": "openai",
    "gpt-image-2.6-flare": "openai",
    "chatgpt-image-latest": "openai",
    "GPT-Image-2": "openai",
    "gemini-3-pro-image": "gemini",
    "gemini-nano-banana-2.1": "gemini",
    "nano-banana-pro": "gemini",
    "flux-2-pro": "flux",
    "flux.1-kontext": "flux",
}


def asked(folders, front, *, preset="", **environ):
    """Run a prompt with this front matter and return the request from its receipt."""
    name = f"{preset}/x" if preset else "x"
    folders.drop(f"{name}.prompt.txt", f"+++\n{front}\n+++\na cat" if front else "a cat")
    ended = command(folders, "once", **environ)
    assert ended.returncode == 0, ended.stderr
    return folders.receipt(name)["request"]


def refused(folders, sandbox, front, **environ):
    folders.prompt("x", f"+++\n{front}\n+++\na cat")
    assert command(folders, "once", **environ).returncode == 1
    assert sandbox.report()["requests"] == 0
    error = folders.error("x")
    assert (error["charged"], error["attempts"]) == ("no", 0)
    return error


def set_up(folders, text):
    """Give the folders a configuration file with these tables."""
    path = folders.root / "imagewatch.toml"
    path.write_text(text)
    folders.environ["IMAGEWATCH_CONFIG"] = str(path)
    return folders


@pytest.mark.parametrize(("model", "provider"), FAMILIES.items())
def test_the_family_of_a_model_decides_the_provider(folders, model, provider):
    assert asked(folders, f'model = "{model}"') == {"provider": provider, "model": model}


@pytest.mark.parametrize("option", ['size = "64x64"', 'quality = "low"', 'output_format = "png"'])
def test_the_family_overrides_the_other_options(folders, option):
    assert asked(folders, f'model = "flux-2-pro"\n{option}')["provider"] == "flux"


def test_the_family_overrides_input_images(tmp_path, sandbox):
    from support.scripted import small_image  # noqa: PLC0415

    folders = Folders(tmp_path, sandbox.base_url)
    folders.drop("x.png", small_image())
    assert asked(folders, 'model = "gpt-image-2"')["provider"] == "openai"


def test_a_model_of_no_known_family_without_a_provider_is_refused_unpaid_with_the_next_step(folders, sandbox):
    error = refused(folders, sandbox, 'model = "dall-e-9"')
    assert '"dall-e-9" belongs to no known family' in error["message"]
    assert 'provider = "openai"' in error["message"]


@pytest.mark.parametrize("table", ["defaults", "presets.p"])
def test_check_names_a_model_of_no_known_family_that_is_set_without_a_provider(folders, table):
    set_up(folders, f'[{table}]\nmodel = "dall-e-9"')
    result = " ".join(command(folders, "check").stdout.split())
    assert f'warn {table} model: "dall-e-9" belongs to no known family' in result
    set_up(folders, f'[{table}]\nmodel = "dall-e-9"\nprovider = "openai"')
    assert "known family" not in command(folders, "check").stdout


@pytest.mark.parametrize("model", ["dall-e-9", "gpt-image", "x-flux", " "])
def test_a_model_is_passed_on_unchanged_to_the_provider_named_with_it(folders, model):
    front = f'provider = "openai"\nmodel = "{model}"'
    assert asked(folders, front) == {"provider": "openai", "model": model}


def test_a_wrong_pair_in_the_front_matter_is_left_to_the_api(folders, sandbox):
    folders.prompt("x", '+++\nprovider = "flux"\nmodel = "gpt-image-2"\n+++\na cat')
    assert command(folders, "once").returncode == 1
    error = folders.error("x")
    assert (error["status"], error["charged"], sandbox.report()["charged"]) == (400, "no", 0)
    assert "is a model of openai, not of flux" in error["message"]


def test_without_a_model_the_provider_is_the_one_that_the_skill_advises(folders):
    assert asked(folders, 'quality = "low"')["provider"] == "openai"


def test_the_models_line_of_the_example_configuration_works_unchanged(folders):
    text = example().replace('## model = "gpt-image-2"', 'model = "gpt-image-2"', 1)
    model = tomllib.loads(text)["defaults"]["model"]
    root = f'root = "{folders.root}"'
    set_up(folders, text.replace('root = "/srv/imagewatch"', root))
    assert asked(folders, "") == {"provider": "openai", "model": model}


@pytest.mark.parametrize(
    ("tables", "front", "wanted"),
    [
        # A model at a nearer level decides the provider of farther levels.
        ('[defaults]\nprovider = "openai"', 'model = "gemini-3-pro-image"', ("gemini", "gemini-3-pro-image")),
        ('[presets.p]\nprovider = "openai"', 'model = "flux-2-pro"', ("flux", "flux-2-pro")),
        ('[presets.p]\nmodel = "flux-2-pro"\n[defaults]\nprovider = "openai"', "", ("flux", "flux-2-pro")),
        # A model of no known family goes to the configured provider.
        ('[presets.p]\nprovider = "openai"', 'model = "dall-e-9"', ("openai", "dall-e-9")),
        # A model at a farther level is dropped if its family is not that of the nearer provider.
        ('[defaults]\nmodel = "gpt-image-2"', 'provider = "flux"', ("flux", None)),
        ('[presets.p]\nprovider = "gemini"\n[defaults]\nmodel = "gpt-image-2"', "", ("gemini", None)),
        ('[defaults]\nprovider = "openai"\nmodel = "dall-e-9"', 'provider = "flux"', ("flux", None)),
        # A model of the same family, or of no known one, stays.
        ('[defaults]\nmodel = "gpt-image-2"', 'provider = "openai"', ("openai", "gpt-image-2")),
        ('[defaults]\nmodel = "dall-e-9"', 'provider = "openai"', ("openai", "dall-e-9")),
        # "auto" replaces the provider of farther levels, as any other provider does.
        ('[defaults]\nprovider = "flux"\nmodel = "gpt-image-2"', 'provider = "auto"', ("openai", "gpt-image-2")),
        ('[presets.p]\nprovider = "openai"', 'provider = "auto"', ("flux", None)),
    ],
)
def test_of_a_provider_and_a_model_of_different_levels_the_nearer_one_counts(folders, tables, front, wanted):
    request = asked(set_up(folders, tables), front, preset="p")
    assert (request["provider"], request.get("model")) == wanted


def test_auto_chooses_no_provider_for_a_model_that_was_set_together_with_one(folders, sandbox):
    set_up(folders, '[defaults]\nprovider = "openai"\nmodel = "dall-e-9"')
    assert "no known family" in refused(folders, sandbox, 'provider = "auto"')["message"]


def test_the_limits_apply_to_the_provider_that_is_asked(tmp_path, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__providers='["flux"]')
    assert "limits.providers" in refused(folders, sandbox, 'model = "gpt-image-2"')["message"]


def test_check_names_the_provider_that_will_be_asked(folders):
    folders.prompt("x", '+++\nmodel = "gemini-3-pro-image"\n+++\na cat')
    folders.prompt("y", '+++\nmodel = "dall-e-9"\n+++\na cat')
    result = {line["what"]: line for line in json.loads(command(folders, "check", "--json").stdout)["files"]}
    assert result["x.prompt.txt"]["why"].startswith("gemini, model gemini-3-pro-image")
    assert result["y.prompt.txt"]["verdict"] == "refuse"


@pytest.mark.parametrize("provider", DEFAULT_MODELS)
@pytest.mark.parametrize(("model", "owner"), FAMILIES.items())
def test_the_sandbox_refuses_the_model_of_another_provider(tmp_path, sandbox, provider, model, owner):
    station = Station(tmp_path, sandbox.base_url)
    station.prompt("x", f'+++\nprovider = "{provider}"\nmodel = "{model}"\n+++\na cat')
    station.work()
    station.close()
    right = provider == owner
    assert station.finished() == {"x": "outbox" if right else "errors"}
    assert sandbox.report()["charged"] == right
