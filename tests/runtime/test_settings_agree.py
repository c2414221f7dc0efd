"""Settings are named in four places, each for a reader of its own: schema, editors, command line, documentation. They agree."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path

from lfm_profiles.schema import GENERATION_SETTINGS, SETTINGS
from lfm_runtime.commands.cli import add_model_arguments, answer_changes, setting_flags
from lfm_runtime.decode.sampling import Generation, GenerationSettings
from lfm_runtime.setup.setup import Flags

ROOT = Path(__file__).resolve().parents[2]


def test_flags_are_a_profiles_settings() -> None:
    assert Flags.__annotations__.keys() == SETTINGS.keys()


def test_generation_flags_are_the_settings() -> None:
    assert Generation.__annotations__.keys() == {f.name for f in fields(GenerationSettings)}
    assert set(GENERATION_SETTINGS) <= Generation.__annotations__.keys()


def test_the_command_line_has_no_setting_of_its_own() -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    of_a_command = {"help", "bundle", "images", "profile", "cache", "verify", "force", "max_megapixels"}
    said = {action.dest for action in parser._actions} - of_a_command
    assert said <= Flags.__annotations__.keys() | Generation.__annotations__.keys()


def test_every_flag_is_passed_on() -> None:
    """Whatever the command line can say of a setting reaches the setup or the answer."""
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    said = argparse.Namespace(**{**{action.dest: 1 for action in parser._actions}, "stop": ["x"]})
    passed = setting_flags(said).keys() | answer_changes(said).keys()
    of_a_command = {"help", "bundle", "images", "profile", "cache", "verify", "force"}
    assert passed == {action.dest for action in parser._actions} - of_a_command


def test_every_setting_is_documented() -> None:
    told = set(re.findall(r"`(\w+)`", (ROOT / "profiles" / "README.md").read_text()))
    assert SETTINGS.keys() <= told, SETTINGS.keys() - told


def test_every_public_name_can_be_imported() -> None:
    import lfm_runtime

    assert all(getattr(lfm_runtime, name) is not None for name in lfm_runtime.__all__)
