"""The commands, settings, paths and make targets that the README files name exist and compose."""

from __future__ import annotations

import re
import shlex
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import MISSING
from PIL import Image

from experiments.config.overrides import creating
from experiments.config.resolvers import register_resolvers
from experiments.config.validation import CONF, ConfigError, check
from tests.experiments.launch import ROOT, launch, runs

ROOMS = ("conf", "datamodules", "experiments", "lightning_modules", "models", "tests")
FILES = [
    ROOT / "README.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    *(page for room in ROOMS for page in sorted((ROOT / room).rglob("README.md"))),
]
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in FILES}
OF_OTHERS = {"encode.py"}  # files of other repositories that a page mentions
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
REQUIRED = "a value is required"
SETTING = re.compile(r"(?!group\.)[a-z_]+(\.\w+)+=\S+")
KEY = re.compile(rf"(?:{'|'.join(path.name for path in CONF.iterdir() if path.is_dir())})(\.\w+)+(?<!\.csv)(?<!\.json)")
CHOICE = re.compile(r"([a-z_/]+)=([\w/]+)(?![\w/.])")
PATH = re.compile(rf"(?<![\w/.<-])(?:{'|'.join(ROOMS)})/[\w.{{}}*<>,/-]*")
MODULE = re.compile(r"(?<![\w./])(?:datamodules|experiments|lightning_modules|models|tests)(?:\.\w+)+")


def code_of(text: str) -> list[str]:
    """Lines of the code blocks, continued lines joined, and the inline code, each on one line."""
    blocks = "\n".join(FENCE.findall(text)).replace("\\\n", " ")
    return [*blocks.splitlines(), *(" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text)))]


def commands_of(text: str) -> list[str]:
    """Every ``python run.py ...`` of a page or of a part of it."""
    return [code for code in code_of(text) if code.startswith("python run.py")]


def overrides_of(command: str) -> list[str]:
    """The overrides of a command, with a word in place of each <placeholder>."""
    words = shlex.split(re.sub(r"<[^<>]*>", "placeholder", command), comments=True)[2:]
    return [word for word in words if not word.startswith("--") and word != "job"]


def jobs_of(overrides: list[str]) -> list[list[str]]:
    """The first and the last job of a sweep; without a sweep the overrides themselves."""
    parsed = [
        _values_of(override) if override.is_sweep_override() else None
        for override in OverridesParser.create().parse_overrides(overrides)
    ]
    if not any(parsed):
        return [overrides]
    keys = [override.split("=", 1)[0] for override in overrides]
    return [
        [f"{key}={values[pick]}" if values else override for key, values, override in zip(keys, parsed, overrides, strict=True)]
        for pick in (0, -1)
    ]


def _values_of(override: Override) -> list[str]:
    """All values of a list, or both ends of an interval."""
    if override.is_discrete_sweep():
        return [*override.sweep_string_iterator()]
    return [str(override.value().start), str(override.value().end)]


@cache
def problems_of(*overrides: str) -> list[str]:
    """What is wrong with a configuration, a line each."""
    register_resolvers()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            check(compose("config", list(overrides)))
    except ConfigError as error:
        return str(error).splitlines()[1:]
    except Exception as error:  # Hydra's, of many classes
        return [str(error).splitlines()[0]]
    return []


COMMANDS = [(page, command) for page, text in PAGES.items() for command in commands_of(text)]


def test_there_are_commands():
    assert len({command for _, command in COMMANDS}) >= 40


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_composes(page, command):
    for job in jobs_of(creating(overrides_of(command))):
        assert problems_of(*job) == [], f"{page}: {command}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_settings_fit_a_command_of_the_page(page):
    """``key=value`` in inline code is right for the recipe and the groups of one of the page's commands."""
    settings = {code for code in code_of(PAGES[page]) if all(SETTING.fullmatch(word) for word in code.split())}
    contexts = contexts_of(page)
    for setting in sorted(settings) if contexts else ():
        words = creating(overrides_of(f"python run.py {setting}"))
        attempts = ([line for line in problems_of(*context, *words) if REQUIRED not in line] for context in contexts)
        assert any(problems == [] for problems in attempts), (page, setting)  # the first that fits ends the search


@pytest.mark.parametrize("page", PAGES)
def test_keys_fit_a_command_of_the_page(page):
    """As above for a ``key`` in inline code without a value."""
    keys = {code for code in code_of(PAGES[page]) if KEY.fullmatch(code)}
    contexts = contexts_of(page)
    for context in contexts if keys else ():
        problems = problems_of(*context, *(f"++{key}={MISSING}" for key in sorted(keys)))
        unknown = {line.removeprefix("  - ").split(":")[0] for line in problems if REQUIRED not in line}
        keys = {key for key in keys if any(f"{key}.".startswith(f"{name}.") for name in unknown)}
    assert not contexts or not keys


def contexts_of(page: str) -> list[tuple[str, ...]]:
    """Recipe and options of groups of each command, without repetitions."""
    commands = map(overrides_of, commands_of(PAGES[page]))
    return sorted({tuple(word for word in words if (CONF / word.split("=")[0]).is_dir()) for words in commands})


@pytest.mark.parametrize("page", PAGES)
def test_options_of_groups_exist(page):
    for code in code_of(PAGES[page]):
        for group, option in CHOICE.findall(code) if " run.py " not in f" {code} " else ():
            if (CONF / group).is_dir() and option != "null":
                assert (CONF / group / f"{option}.yaml").is_file(), code


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    text = re.sub(r"<[^<>\n]*>", "*", PAGES[page])
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link
    files = [code for code in code_of(PAGES[page]) if re.fullmatch(r"[\w/.-]+\.(py|yaml|md)", code) and code not in OF_OTHERS]
    for path in {*PATH.findall(text), *files}:
        for pattern in expanded(path.rstrip(".,")):
            assert any(any(place.glob(pattern)) for place in (ROOT, CONF, folder)), path


def expanded(path: str) -> list[str]:
    """The paths that braces stand for: ``{a,b}/c`` is ``a/c`` and ``b/c``."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if not braces:
        return [path]
    return [one for part in braces[1].split(",") for one in expanded(path[: braces.start()] + part + path[braces.end() :])]


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in code_of(PAGES[page]):
        assert {*re.findall(r"^make ([a-z-]+)", code)} <= targets, code
        for dotted in MODULE.findall(code):
            parts = dotted.split(".")
            while parts and not (file := ROOT.joinpath(*parts).with_suffix(".py")).is_file():
                if (file := ROOT.joinpath(*parts, "__init__.py")).is_file():
                    break
                parts.pop()
            assert parts, dotted
            for name in dotted.split(".")[len(parts) : len(parts) + 1]:
                assert re.search(rf"^(class |def )?{name}\b", file.read_text(), re.MULTILINE), dotted


@pytest.mark.slow
def test_everyday_commands_run(tmp_path):
    """In the order of the top page, on tiny data; ``<run dir>`` is the run of the first result."""
    first = "python run.py experiment=sail_dinov2"
    commands = commands_of(PAGES["README.md"].split("## Everyday commands")[1].split("\n## ")[0])
    assert len(commands) >= 10
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "a.jpg")
    tiny = "debug=tiny/alignment/default"
    done = launch(tmp_path, *shlex.split(first)[2:], tiny)
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "sail_dinov2")
    for command in commands:
        words = shlex.split(command.replace("<run dir>", str(run)))[2:]
        flags = words[words.index("--cfg") :] if "--cfg" in words else []
        few = [f"datamodule.simulate.{split}=24" for split in ("train", "val", "test")]
        overrides = words[: len(words) - len(flags)] + (few if "debug=" in command else [tiny])
        done = launch(tmp_path, *flags, *overrides)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
