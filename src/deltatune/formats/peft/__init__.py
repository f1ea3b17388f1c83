"""peft's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, as peft 0.4 to 0.21 write them.

One file is one family of types; a type is a `Form`, which says how peft keeps one method at one module. The sites come
from the keys of the tensors, never from the config's patterns.
"""

from deltatune.formats.peft.folder import is_peft
from deltatune.formats.peft.read import read_peft
from deltatune.formats.peft.write import write_peft

__all__ = ["is_peft", "read_peft", "write_peft"]
