"""The suite. Importing it prepares a process, pytest's own and each distributed worker alike."""

import os

# Before torch is imported: the suite runs several processes, and threads that compete for the
# cores make them slower and their sums depend on the machine.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pkgutil  # noqa: E402
from importlib.util import find_spec  # noqa: E402

from jaxtyping import install_import_hook  # noqa: E402

import megahybrid  # noqa: E402

if os.environ.get("MEGAHYBRID_TESTS_ANNOTATIONS") == "off":
    ANNOTATIONS = "not checked (a process as a user starts it)"
elif find_spec("beartype") is None:
    ANNOTATIONS = "not checked (needs beartype)"
else:
    from tests import annotations

    # From here on every annotation of the package, shapes included, is checked at each call, save
    # those of data preparation: its files are anything that reads, beartype wants real BinaryIO.
    rooms = pkgutil.iter_modules(megahybrid.__path__, "megahybrid.")
    checked = [room.name for room in rooms if room.name != "megahybrid.data_prep"]
    annotations.patch_jaxtyped()
    install_import_hook(checked, f"{annotations.__name__}.check")
    ANNOTATIONS = "checked"
