"""Profile files: what they may say, what they inherit, what is refused and how."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lfm_profiles import Profile, ProfileError, read, with_flags
from lfm_profiles.files import names
from lfm_profiles.schema import SETTINGS, Board, Budget, Match
from lfm_runtime.commands.cli import main

ROOT = Path(__file__).resolve().parents[2]
WANTED = {
    "generic-x86",
    "x86-avx2",
    "x86-avx512-vnni",
    "generic-arm64",
    "pi-zero2w",
    "pi3",
    "pi4",
    "pi5",
    "jetson-nano",
    "jetson-orin-cpu",
    "jetson-orin-cuda",
    "jetson-agx-orin-cuda",
    "apple-silicon",
    "x86-cuda",
    "fast",
    "balanced",
    "small",
    "quality",
}


def profile(folder: Path, text: str, name: str = "mine") -> str:
    (folder / f"{name}.toml").write_text(text)
    return str(folder / f"{name}.toml")


def test_shipped_profiles(capsys) -> None:
    assert set(names()) >= WANTED
    for name in names():
        found = read(name, detected=lambda: read("pi4"))
        assert found.name == name
        assert found.description
        assert found.origin.keys() <= SETTINGS.keys()
        assert main(["profile", "validate", name]) == 0
        assert main(["profile", "show", name]) == 0
        assert found.description in capsys.readouterr().out
    assert main(["profile", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names())
    assert out.count("\n* ") + out.startswith("* ") == 2  # this machine's, and the legend
    assert main(["profile", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["profiles"]
    assert [each["name"] for each in listed] == list(names())
    assert sum(each["fits_this_machine"] for each in listed) == 1


def test_inheritance(tmp_path) -> None:
    """Settings and budgets come from the parent, rules when to take it do not."""
    profile(
        tmp_path,
        'threads = 3\nmax_tiles = 4\n[match]\nboard = ["x"]\n[budget]\nttft_ms = 900\npeak_rss_mib = 500\n',
        "parent",
    )
    path = profile(tmp_path, 'extends = "parent"\ndescription = "Mine"\nmax_tiles = 2\n[budget]\nttft_ms = 500\n')
    found = read(path)
    assert (found.name, found.description, found.threads, found.max_tiles) == ("mine", "Mine", 3, 2)
    assert found.origin == {"threads": "parent", "max_tiles": "mine"}
    assert found.budget == Budget(500, 500, None)
    assert found.match == Match()
    both = with_flags(found, {"threads": 1})
    assert (both.threads, both.origin["threads"], both.is_flag("threads")) == (1, "flag", True)


def test_extending_a_shipped_profile_of_the_same_name(tmp_path) -> None:
    found = read(profile(tmp_path, 'extends = "pi4"\nthreads = 2\n', "pi4"))
    assert (found.threads, found.max_image_tokens) == (2, 128)


def test_extending_the_detected_one(tmp_path) -> None:
    path = profile(tmp_path, 'extends = "auto"\nthreads = 2\n')
    assert read(path, detected=lambda: read("pi4-1gb")).low_memory
    assert not read(path).low_memory


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("threads = \n", "is not TOML"),
        ("threads = 2\nthread = 3\n", "line 2: unknown key 'thread'; did you mean threads?"),
        ("\n\nthreads = 0\n", "line 3: threads = 0 is impossible; allowed: 1 to 1024"),
        ('threads = "2"\n', "line 1: threads = '2' is impossible; allowed: 1 to 1024, without quotes"),
        ("threads = true\n", "line 1: threads = true is impossible"),
        ("[budget]\ndecode_tok_s = inf\n", "decode_tok_s = inf is impossible; allowed: above 0 (tok/s), and finite"),
        ('threads = "two"\n', "line 1: threads = 'two' is impossible"),
        ('variant = "int4"\n', "allowed: a list of fp32"),
        ('variant = ["int4", "int4"]\n', "is impossible"),
        ('variant = ["int3"]\n', "line 1: variant = ['int3'] is impossible"),
        ('providers = ["CUDAExecutionProvider"]\n', "CPUExecutionProvider last"),
        (
            "affinity = [0, 0]\n",
            "affinity = [0, 0] is impossible; allowed: none, cores, a list of processor numbers, each once",
        ),
        ("spinning = 0\n", "allowed: true, false, 1 to 1000000 (µs)"),
        (
            "max_image_tokens = 64\nmin_image_tokens = 128\n",
            "line 2: min_image_tokens = 128 is above max_image_tokens = 64",
        ),
        ("[match]\nmin_ram_mib = 9\nmax_ram_mib = 3\n", "line 2: min_ram_mib = 9 is above max_ram_mib = 3"),
        (
            "do_image_splitting = false\nmax_tiles = 3\n",
            "line 2: max_tiles has no effect beside do_image_splitting = false",
        ),
        ('low_memory = true\nprefill = "int8"\n', "line 2: prefill has no effect beside low_memory"),
        ("threads = 2\naffinity = [0]\n", "line 2: affinity names 1 of the 2 processors that threads needs"),
        ('extends = "x86-cuda"\nlow_memory = true\n', "line 2: low_memory = true is for the CPU"),
        ("[budget]\nttft = 3\n", "line 2: unknown key 'ttft'; did you mean ttft_ms?"),
        ("[match]\nmin_ram_mib = -5\n", "line 2: min_ram_mib = -5 is impossible; allowed: 1 and above (MiB)"),
        ("budget = 3\n", "line 1: budget must be a table: [budget]"),
        ("threads = 3\n[match]\nthreads = 3\n", "line 3: unknown key 'threads'"),
        ("extends = 3\n", "line 1: extends must be a string"),
        (
            'threads = 2\nextends = "nothing"\n',
            "mine.toml, line 2: there is no profile 'nothing'; shipped: auto, apple",
        ),
        ('extends = "mine"\n', "there is no profile"),
        ('threads = 2\nextends = "nothing.toml"\n', "mine.toml, line 2: "),
        ('threads = 2\nextends = "nothing.toml"\n', "nothing.toml does not exist"),
        ("[[rules]]\n", "unknown key 'rules'"),
        ("a = " + "[" * 50_000, "is not TOML"),
        ('threads = 1\ndescription = "\\u001b[31mred"\n', "line 2: description has characters that cannot be shown"),
        ("context = 1e3\n", "context = 1000.0 is impossible; allowed: 64 to 1048576 (tokens)"),
        ("arena = 1\n", "arena = 1 is impossible"),
    ],
)
def test_a_profile_with_a_wrong_value_is_refused_with_its_place(text, says, tmp_path, capsys) -> None:
    path = profile(tmp_path, text)
    with pytest.raises(ProfileError, match=re.escape(says)):
        read(path)
    assert main(["profile", "validate", path]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_a_file_beside_it_is_extended(tmp_path) -> None:
    """By its name with and without .toml, wherever one stands."""
    profile(tmp_path, "threads = 3\n", "base")
    for extends in ("base", "base.toml", str(tmp_path / "base.toml")):
        assert read(profile(tmp_path, f'extends = "{extends}"\n', "mine")).threads == 3


@pytest.mark.parametrize(
    ("below", "text", "says"),
    [
        ("affinity = [0, 1]", "threads = 4", "affinity names 2 of the 4 processors"),
        ("threads = 4", "affinity = [0, 1]", "affinity names 2 of the 4 processors"),
        (
            "low_memory = true",
            'providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]',
            "low_memory = true is for the CPU; write low_memory = false",
        ),
        ("max_tiles = 4", "min_tiles = 6", "min_tiles = 6 is above max_tiles = 4"),
        ("do_image_splitting = false", "max_tiles = 4", ""),  # a wish, for devices where it is on
        ("affinity = [0, 1]\nthreads = 2", "threads = 1", ""),
        ("max_tiles = 4", "do_image_splitting = false", ""),
    ],
)
def test_what_contradicts_an_extended_file_is_refused(tmp_path, below, text, says) -> None:
    (tmp_path / "below.toml").write_text(below)
    path = profile(tmp_path, f'extends = "below.toml"\n{text}\n')
    if not says:
        read(path)
        return
    with pytest.raises(ProfileError, match=f"line 2: {says}"):
        read(path)


def test_cycles_and_missing_files(tmp_path) -> None:
    profile(tmp_path, 'extends = "two"\n', "one")
    profile(tmp_path, 'extends = "one"\n', "two")
    with pytest.raises(ProfileError, match="circular: one → two → one"):
        read(str(tmp_path / "one.toml"))
    with pytest.raises(ProfileError, match=r"none.toml does not exist; name a .toml file, or one of: auto, "):
        read(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ProfileError, match=r"cannot be read \(Is a directory\); check the path"):
        read(str(tmp_path / "folder.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match="is not TOML"):
        read(str(tmp_path / "binary.toml"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*SETTINGS, "nonsense"]), VALUES, max_size=3))
def test_flags_are_taken_or_refused_whole(flags) -> None:
    """Any value of any setting: a profile that holds it, or a ProfileError; nothing else."""
    try:
        made = with_flags(Profile("p"), flags)
    except ProfileError:
        return
    for name, value in flags.items():
        assert getattr(made, name) == (tuple(value) if isinstance(value, list) else value)
        assert made.is_flag(name)


def test_every_setting_is_documented() -> None:
    """The tables of profiles/README.md are the schema's own words."""
    text = (ROOT / "profiles" / "README.md").read_text()
    tables = {
        "": SETTINGS,
        "match.": {f.name: f for f in Match.__dataclass_fields__.values()},
        "budget.": {f.name: f for f in Budget.__dataclass_fields__.values()},
        "board.": {f.name: f for f in Board.__dataclass_fields__.values()},
    }
    for prefix, known in tables.items():
        for name, field in known.items():
            m = field.metadata
            assert f"| `{prefix}{name}` | {m['allowed']} | {m['unit']} | {m['meaning']} |" in text
    assert set(re.findall(r"^\| `([a-z0-9_.]+)` \|[^|]*\|[^|]*\|[^|]*\|$", text, re.MULTILINE)) == {
        f"{p}{n}" for p, known in tables.items() for n in known
    }


def test_a_profile_that_was_edited_is_read_again(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    for threads in (1, 2):
        path.write_text(f"threads = {threads}\n")
        assert read(str(path)).threads == threads
