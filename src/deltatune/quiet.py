"""Keeping what other libraries say while they are imported out of the command line's output; errors still come through."""

from __future__ import annotations

import logging

# torchao tells of kernels that this machine has no use for, torch of torchao's enums, bitsandbytes of kernels to download
CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes")


def quiet() -> None:
    """Let these libraries log errors only, in this process."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
