"""What is installed: the pins of requirements.txt, conda's environment.yml, and constraints.txt for everything beneath them."""

import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parent.parent
PLATFORMS = {
    "Linux x86": dict(sys_platform="linux", platform_machine="x86_64", os_name="posix", platform_system="Linux"),
    "Linux ARM": dict(sys_platform="linux", platform_machine="aarch64", os_name="posix", platform_system="Linux"),
    "macOS": dict(sys_platform="darwin", platform_machine="arm64", os_name="posix", platform_system="Darwin"),
    "Windows": dict(sys_platform="win32", platform_machine="AMD64", os_name="nt", platform_system="Windows"),
}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def _requirements(name):
    lines = (line.partition("#")[0].strip() for line in (CHECKOUT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


PINNED, CONSTRAINTS = _requirements("requirements.txt"), _requirements("constraints.txt")


def _on(platform, python):
    """The constraints that hold on a platform, versions by name."""
    about = {**PLATFORMS[platform], "python_version": python, "python_full_version": f"{python}.9"}
    about |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    held = {}
    for one in CONSTRAINTS:
        if one.marker is None or Marker(str(one.marker)).evaluate(about):
            assert canonicalize_name(one.name) not in held, f"{one.name} is pinned twice on {platform}, {python}"
            (pin,) = one.specifier
            held[canonicalize_name(one.name)] = pin.version
    return held


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_pin_is_among_the_constraints(platform, python):
    """`tools/constraints.py` makes them again after a change of requirements.txt, and `--check` resolves for each of these."""
    held = _on(platform, python)
    for requirement in PINNED:
        (pin,) = requirement.specifier
        assert pin.operator == "==" and held[canonicalize_name(requirement.name)] == pin.version, requirement
    assert len(held) > 150


def test_what_a_package_asks_for_is_pinned_too():
    """Of this environment, down to the last package: nothing of it floats."""
    from importlib import metadata

    names = {canonicalize_name(one.name) for one in CONSTRAINTS}
    todo, seen = [(one.name, tuple(one.extras)) for one in PINNED], set()
    while todo:
        name, extras = todo.pop()
        if (canonicalize_name(name), extras) in seen:
            continue
        seen.add((canonicalize_name(name), extras))
        assert canonicalize_name(name) in names, f"{name} floats: run tools/constraints.py"
        for line in metadata.requires(name) or []:
            asked = Requirement(line)
            if asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo.append((asked.name, tuple(asked.extras)))
    assert len({name for name, _ in seen}) > 150


def test_no_hash_and_no_index_is_named():
    for name in ("requirements.txt", "constraints.txt"):
        assert not any(line.startswith("-") or "--hash" in line for line in (CHECKOUT / name).read_text().splitlines())


def test_what_conda_installs_is_the_same():
    """Names and versions are those of requirements.txt, which it reads; nothing beside it but Python and pip."""
    lines = (CHECKOUT / "environment.yml").read_text(encoding="utf-8").splitlines()
    entries = [line.strip().removeprefix("- ") for line in lines if line.strip().startswith("- ")]
    assert entries == ["conda-forge", "python=3.12", "pip", "pip:", "-c constraints.txt", "-r requirements.txt", "-e ."]


def test_the_pythons_are_those_that_are_named():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        line.rpartition(" ")[2]
        for line in project["classifiers"]
        if line.startswith("Programming Language :: Python :: 3.")
    }
    assert named == set(PYTHONS) and project["requires-python"] == f">={PYTHONS[0]}"


@pytest.mark.parametrize("name", ["Makefile", "Dockerfile", "README.md", "docs/offline.md", "environment.yml"])
def test_every_way_to_install_takes_the_constraints(name):
    text = (CHECKOUT / name).read_text(encoding="utf-8")
    assert "-r requirements.txt" in text
    for line in text.splitlines():
        assert "-r requirements.txt" not in line or "-c constraints.txt" in line or name == "environment.yml", line
