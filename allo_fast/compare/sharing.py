"""Units that several runs of a comparison have in common are made once: a unit's basis says what comes of it."""

import hashlib
import json
import os
import shutil
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from allo_fast.config import UserError
from allo_fast.durable import appearing, locked, read_json
from allo_fast.runs.contents import damage
from allo_fast.runs.home import MANIFEST, recorded
from allo_fast.runs.unit import Unit


def take(unit: Unit, folder: Path) -> bool:
    """Makes the unit of files of an equal one, whole, of another run below `folder`; whether there is one.

    Files are linked where the file system can: what is complete is not written again.
    """
    basis = unit.basis()
    for manifest in sorted(folder.glob(f"*/*/{unit.place}/{MANIFEST}")):
        with suppress(UserError):  # damaged, or of another version: not equal
            if recorded(source := manifest.parent) == basis and not damage(source, read_json(manifest)["outputs"], {}):
                with appearing(unit.folder) as partial:
                    shutil.copytree(source, partial, copy_function=_linked)
                return True
    return False


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def alone_with(unit: Unit, folder: Path) -> AbstractContextManager[None]:
    """Until the context ends no other command makes an equal unit; one that is at it is waited for."""
    name = hashlib.sha256(json.dumps([str(unit.place), unit.basis()], sort_keys=True).encode()).hexdigest()[:32]
    return locked(folder / ".locks" / name)
