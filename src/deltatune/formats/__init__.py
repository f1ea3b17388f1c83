"""Files of other libraries, read as weights of deltatune and written from them. Importing this package lets `dt.load` read them."""

from __future__ import annotations

from deltatune.core.store import READERS
from deltatune.formats.peft.folder import CONFIG
from deltatune.formats.peft.read import read_peft

READERS.setdefault(CONFIG, read_peft)
