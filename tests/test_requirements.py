"""The lock holds an environment that the requirements ask for, from no particular host."""

from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def test_the_lock_meets_the_requirements() -> None:
    pins = read("requirements.lock")
    for wanted in read("requirements.txt") + read("requirements-dev.txt"):
        versions = [
            pin.specifier
            for pin in pins
            if canonicalize_name(pin.name) == canonicalize_name(wanted.name)
            and any(wanted.specifier.contains(one.version) for one in pin.specifier)
        ]
        assert versions, f"requirements.lock lacks {wanted}; its first lines say how to make it again"


def test_the_lock_pins_everything_and_names_no_place() -> None:
    for pin in read("requirements.lock"):
        assert pin.url is None
        assert [one.operator for one in pin.specifier] == ["=="] and "+" not in str(pin.specifier), pin


def test_torch_is_not_pinned_where_a_user_has_chosen_a_build() -> None:
    """A pin would replace the build for another CUDA version; CI takes the locked versions as constraints."""
    (torch,) = (wanted for wanted in read("requirements.txt") if wanted.name == "torch")
    assert [one.operator for one in torch.specifier] == [">="]
    assert "-c requirements.lock" in (ROOT / ".ci" / "run").read_text()
