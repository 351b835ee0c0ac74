"""Find a profile by path or shipped name and read it."""

from importlib import resources
from pathlib import Path

from compressor.errors import CompressError
from compressor.options import nearest
from compressor.run.overrides import apply_overrides
from compressor.run.profile import KEYS, Profile
from compressor.run.validate import validate
from compressor.run.yaml_lines import read_yaml


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    folder = resources.files("compressor.profiles")
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_profile(profile: str | Path, overrides: tuple[str, ...] = ()) -> Profile:
    """Load a profile by path or shipped name and validate all of it.

    Args:
        profile: path of a YAML file, or the name of a shipped profile.
        overrides: "stages.N.KEY=VALUE" or "KEY=VALUE" texts, N from 1.

    Raises:
        CompressError: with file:line and the nearest valid name.
    """
    text, name = _read(profile)
    document = read_yaml(text, name)
    if not isinstance(document.data, dict):
        raise CompressError(f"{name}: a profile is a mapping of keys", f"keys: {', '.join(KEYS)}")
    return validate(apply_overrides(document, overrides))


def _read(profile: str | Path) -> tuple[str, str]:
    path = Path(profile)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return path.read_text(encoding="utf-8"), path.name
        except UnicodeDecodeError as error:
            raise CompressError(f"{path} is not UTF-8 text", "save it as UTF-8") from error
        except OSError as error:
            raise CompressError(
                f"profile '{profile}' cannot be read ({error.strerror})",
                f"give a YAML file or one of: {', '.join(shipped_profiles())}",
            ) from error
    known = shipped_profiles()
    if str(profile) not in known:
        raise CompressError(
            f"unknown profile '{profile}'{nearest(str(profile), known)}",
            f"give a YAML file or one of: {', '.join(known)}",
        )
    file = resources.files("compressor.profiles") / f"{profile}.yaml"
    return file.read_text(encoding="utf-8"), f"{profile}.yaml"
