"""The heap keeps what it has freed for the next step, or gives it back: seen from the system, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from deltatune.tuning import heap
from deltatune.tuning.memory import in_use
print(getattr(heap, sys.argv[1])())
def step():
    tensors = [torch.ones(1 << 18) for _ in range(64)]  # 64 MiB
    return in_use(torch.device("cpu"))
before, full = in_use(torch.device("cpu")), step()
print(full - before, in_use(torch.device("cpu")) - before)
"""
MEBIBYTE = 1 << 20


def seen(name: str, **environment: str) -> tuple[str, int, int]:
    """What a call says, and how many bytes a process holds with 64 MiB of tensors and after them."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    said, sizes = done.stdout.splitlines()
    full, after = map(int, sizes.split())
    return said, full, after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap can be told")
def test_freed_memory_is_kept_or_given_back() -> None:
    said, full, after = seen("keep")
    assert said == "True" and full > 60 * MEBIBYTE and after > 0.9 * full
    said, full, after = seen("give_back")
    assert said == "True" and full > 60 * MEBIBYTE and after < 4 * MEBIBYTE


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap can be told")
def test_what_a_user_chose_stays() -> None:
    assert seen("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
