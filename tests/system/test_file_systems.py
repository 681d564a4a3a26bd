"""What is known of file systems, asked about real ones."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from imagewatch.system.file_systems import is_local, mount_of, table

if TYPE_CHECKING:
    from pathlib import Path

LOCAL = {"btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs"}


def test_a_disk_is_local_and_a_file_system_of_the_kernel_is_not_known_to_be(tmp_path: Path) -> None:
    mount = mount_of(str(tmp_path), table())
    if mount is None or mount.kind not in LOCAL:
        pytest.skip("the temporary folder is on another file system")
    for path, expected in ((str(tmp_path), True), ("/proc", False)):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            assert is_local(descriptor) == expected
        finally:
            os.close(descriptor)
