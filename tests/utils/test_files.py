"""Files and directories that appear whole or not at all."""

import os

import pytest

from difflm_jax.errors import UserError
from difflm_jax.utils.files import check_writable, new_directory, write_whole


def test_a_link_is_followed_and_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path / "pipe", "a device or a pipe"), (tmp_path, "a directory")):
        with pytest.raises(UserError, match=f"is {what}, not a file to write"):
            check_writable(path)
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path / "nowhere" / "file")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "kept").write_text("1")
    with pytest.raises(UserError, match="exists and is not empty"), new_directory(tmp_path / "adapter"):
        pass
    with pytest.raises(RuntimeError), new_directory(tmp_path / "adapter", lambda _: True) as fresh:
        (fresh / "half").write_text("2")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
