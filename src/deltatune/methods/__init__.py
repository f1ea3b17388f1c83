"""The methods, in the paper's three groups; one file is one idea. Importing this package defines them all."""

import pkgutil
from importlib import import_module

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    import_module(_module.name)
