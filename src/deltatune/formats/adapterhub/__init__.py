"""Folders of the library `adapters` (AdapterHub): `adapter_config.json` and `adapter.safetensors`.

The file names the method by a config and every tensor by the module that holds it, with the adapter's name in between. What
the method does there depends on where the backbone has its norms, so the families are those whose norms are known here.
"""

from deltatune.formats.adapterhub.folder import is_adapterhub
from deltatune.formats.adapterhub.read import read_adapterhub
from deltatune.formats.adapterhub.write import write_adapterhub

__all__ = ["is_adapterhub", "read_adapterhub", "write_adapterhub"]
