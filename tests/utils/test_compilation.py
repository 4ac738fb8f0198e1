"""Compiled programs are kept where only their owner writes, unless the user says otherwise."""

from pathlib import Path

import jax
import pytest

from difflm_jax.utils.compilation import MAX_BYTES, keep_compiled, own_directory

KEYS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_enable_compilation_cache",
)


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """jax as it starts, with no cache directory; what it was is put back."""
    before = {key: getattr(jax.config, key) for key in KEYS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    for key, value in before.items():
        jax.config.update(key, value)


def test_programs_are_kept_in_a_directory_of_the_owner_alone(no_cache: Path) -> None:
    keep_compiled()
    directory = Path(jax.config.jax_compilation_cache_dir)
    assert no_cache / "difflm_jax" in directory.parents
    assert directory.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_max_size == MAX_BYTES


def test_a_directory_of_the_user_is_left_alone(no_cache: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(no_cache / "mine"))
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(no_cache / "mine")
    assert not (no_cache / "difflm_jax").exists()


def test_a_cache_that_is_turned_off_stays_off(no_cache: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_directory_that_cannot_be_made_is_announced(no_cache: Path, capsys) -> None:
    (no_cache / "difflm_jax").write_text("in the way")
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
    assert "compiled programs are not kept" in capsys.readouterr().out


def test_a_user_without_a_home_is_told_what_to_set(no_cache: Path, monkeypatch, capsys) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", no_home)
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
    assert "there is no home directory: set XDG_CACHE_HOME" in capsys.readouterr().out
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        own_directory("native")
