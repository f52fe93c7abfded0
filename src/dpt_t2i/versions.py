"""Versions of installed packages."""

from importlib.metadata import PackageNotFoundError, version


def installed(name: str) -> str | None:
    """Version of an installed package; None where it is not installed, as in a source tree that is merely run."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def told(*names: str) -> dict[str, str]:
    """Version of each package, `unknown` where it is not installed: what a file says of how it was made."""
    return {name: installed(name) or "unknown" for name in names}
